"""What the command lines of the tools share: types of arguments, exit codes, and how a mistake is reported."""

from __future__ import annotations

import argparse
import math
import os
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, NoReturn

from yarl import URL

from embedding_common.keys import parse_keys, secrets_from_files

if TYPE_CHECKING:
    from argparse import _ArgumentGroup

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130
API_KEY = "EMBEDDING_API_KEY"


class Misuse(Exception):
    """A mistake that only the caller can correct. The message is one line."""


def _version() -> str:
    """Returns the version of the installed package. A clone that is not installed has none."""
    try:
        return version("embedding-service")
    except PackageNotFoundError:
        return "(not installed)"


class Parser(argparse.ArgumentParser):
    """A parser that reports a mistake in one line, and keeps the line breaks of the text below the options.

    `epilog` may name the program as `%(prog)s`; if it does, it must write each other percent sign as `%%`.
    """

    def __init__(self, *, prog: str, description: str, epilog: str) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, epilog=epilog, formatter_class=formatter)
        self.add_argument("--version", action="version", version=f"%(prog)s {_version()}")

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message} (--help shows the options)\n")


def add_api_key(group: _ArgumentGroup) -> None:
    """Adds the option that names the file with the API key.

    No option takes the key itself: every user who lists the processes of the machine would read it.
    """
    group.add_argument(
        "--api-key-file",
        dest="api_key",
        metavar="PATH",
        help=f"a file with the key to send; of several keys the first is sent (default: {API_KEY}, {API_KEY}_FILE)",
    )


def read_api_key(parser: Parser, path: str | None) -> str | None:
    """Returns the first key in the file `path`, else the first one in the environment, else None.

    A mistake ends the program with one line.
    """
    try:
        given = secrets_from_files({f"{API_KEY}_FILE": path} if path else os.environ, [API_KEY]).get(API_KEY)
    except ValueError as mistake:
        parser.error(str(mistake))
    try:
        return parse_keys(given)[0] if given else None
    except ValueError as mistake:
        parser.error(f"{API_KEY}: {mistake}")


def http_url(text: str) -> str:
    try:
        url = URL(text)
    except ValueError:
        url = URL()
    if url.scheme not in {"http", "https"} or not url.host:
        raise argparse.ArgumentTypeError(f"{text!r} is no http:// URL")
    return text.rstrip("/")


def positive_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def positive_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text!r}")
    return seconds
