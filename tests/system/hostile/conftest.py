"""What the hostile cases came to, as a table at the end of the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.system.hostile.target import Target

if TYPE_CHECKING:
    from collections.abc import Iterator

FIGURES = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def figures(request: pytest.FixtureRequest) -> list[str]:
    """Lines to be shown at the end."""
    return request.config.stash.setdefault(FIGURES, [])


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with Target(tmp_path_factory.mktemp("hostile")) as target:
        yield target


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if lines := config.stash.get(FIGURES, []):
        terminalreporter.section("hostile input")
        terminalreporter.write_line(f"{'':24}{'cases':>7} {'slowest':>9} {'memory':>9}  replies")
        for line in lines:
            terminalreporter.write_line(line)
