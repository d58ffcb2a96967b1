"""What all tests share: a free port, and the table of how much of the packages the unit tests run."""

from __future__ import annotations

import json
import socket
from collections import Counter
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

OTHER_PROCESSES = ("stack", "faults", "compose")
"""Markers of tests whose subject runs in other processes: tracing here would slow them, and measure nothing."""


@pytest.fixture
def unused_port() -> int:
    """A loopback port on which no process listens now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def pytest_collection_modifyitems(config: pytest.Config, items: Sequence[pytest.Item]) -> None:
    for item in items if config.getoption("cov_source", None) else ():
        if any(item.get_closest_marker(name) for name in OTHER_PROCESSES):
            item.add_marker("no_cover")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Shows the coverage that scripts/test asked for, one line for each package; the report by file is too long."""
    path = (getattr(config.option, "cov_report", None) or {}).get("json")
    if not config.getoption("cov_source", None) or path is None or not (config.rootpath / path).is_file():
        return
    lines: Counter[str] = Counter()
    ran: Counter[str] = Counter()
    for file, told in json.loads((config.rootpath / path).read_bytes())["files"].items():
        for name in (file.partition("/")[0], "all"):
            lines[name] += told["summary"]["num_statements"]
            ran[name] += told["summary"]["covered_lines"]
    terminalreporter.section("statements that the unit tests run in their own process")
    for name in sorted(lines, key=lambda name: (name == "all", name)):
        terminalreporter.line(f"{name:<18} {ran[name] / max(1, lines[name]):6.1%} of {lines[name]:>6,}")
