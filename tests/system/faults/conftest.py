"""One stack of real parts for all cases, another whose replicas cost nothing, and a table of what the cases came to."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from local_stack.stack import LocalStack

from tests.system.stack.client import Client
from tests.system.stack.running import mend, pytest_runtest_makereport, running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["pytest_runtest_makereport"]

FIGURES = pytest.StashKey[list[tuple[str, str]]]()
REPLICA = Path(__file__).with_name("replica.py")
GATEWAY_DRAIN_S = 1.5
"""Callers that send all the time are told within it that their connection closes."""


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Notes what a case came to, for the table at the end."""
    lines = request.config.stash.setdefault(FIGURES, [])

    def note(case: str, **found: Any) -> None:
        lines.append((case, ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in found.items())))

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if lines := config.stash.get(FIGURES, []):
        terminalreporter.section("faults")
        for case, found in lines:
            terminalreporter.write_line(f"{case:<44} {found}")


@pytest.fixture(scope="session")
def real_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    env = {"DRAIN_S": str(GATEWAY_DRAIN_S)}
    with running(LocalStack(state_dir=tmp_path_factory.mktemp("real"), env=env)) as stack:
        yield stack


@pytest.fixture(scope="session")
def cheap_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """Real Redis, HAProxy and gateway before replicas that can be told to misbehave: see replica.py."""
    command = [sys.executable, str(REPLICA)]
    with running(LocalStack(state_dir=tmp_path_factory.mktemp("cheap"), replica_command=command)) as stack:
        yield stack


@pytest.fixture
def stack(real_stack: LocalStack) -> Iterator[LocalStack]:
    """Everything is up before and after each case."""
    yield real_stack
    mend(real_stack)


@pytest.fixture
def client(stack: LocalStack) -> Iterator[Client]:
    client = Client(stack)
    yield client
    client.close()


@pytest.fixture
def cheap(cheap_stack: LocalStack) -> Iterator[LocalStack]:
    yield cheap_stack
    mend(cheap_stack)


@pytest.fixture
def cheap_client(cheap: LocalStack) -> Iterator[Client]:
    client = Client(cheap)
    yield client
    client.close()
