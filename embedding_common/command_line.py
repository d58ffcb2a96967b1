"""The command lines of both servers: `--help`, `--version`, and how a start that fails is reported.

A server takes all its settings from the environment, so its command line has no other options.
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version
from textwrap import indent, wrap
from typing import TYPE_CHECKING, NoReturn

from embedding_common.settings import SettingsError, read_environment, variables

if TYPE_CHECKING:
    from collections.abc import Sequence

    from embedding_common.settings import EnvironmentSettings, S, Variable

EXIT_FAILED, EXIT_USAGE = 1, 2
_COLUMNS = 100


def start(program: str, kind: type[S], *, command: str, description: str, arguments: Sequence[str] | None = None) -> S:
    """Returns the settings of `program`, unless its command line or its environment ends it.

    Exits with 0 after `--help` and `--version`, and with 2 if an argument is unknown or a variable is wrong: then with
    one line for each. `command` is how the program was called; `arguments` are those of the process by default.
    """
    parser = argparse.ArgumentParser(
        prog=command,
        description="\n".join(wrap(description, _COLUMNS)),
        epilog=_list(kind),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{program} {version('embedding-service')}")
    parser.parse_args(arguments)
    try:
        return read_environment(kind)
    except SettingsError as wrong:
        end(program, EXIT_USAGE, wrong)


def end(program: str, code: int, reason: Exception | str) -> NoReturn:
    """Ends the process with `code`; each line of the reason is written to stderr, behind the program's name."""
    for line in str(reason).splitlines():
        sys.stderr.write(f"{program}: {line}\n")
    sys.exit(code)


def _list(kind: type[EnvironmentSettings]) -> str:
    entries = [_entry(variable) for variable in variables(kind)]
    return "\n".join(["environment variables:", *entries])


def _entry(variable: Variable) -> str:
    default = f" (default: {variable.default})" if variable.default else ""
    summary = "\n".join(wrap(variable.summary, _COLUMNS - 6))
    return f"  {variable.name}{default}\n{indent(summary, ' ' * 6)}"
