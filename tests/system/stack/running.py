"""A stack that runs for tests: started as a whole, mended after each, its last words shown beside a failure."""

from __future__ import annotations

import contextlib
import signal
from typing import TYPE_CHECKING

import pytest
from local_stack.part import StackError
from local_stack.stack import LocalStack

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

LAST_LINES = 15


@contextlib.contextmanager
def running(stack: LocalStack) -> Iterator[LocalStack]:
    """Starts every part, waits until all answer, and ends them."""
    with stack:
        stack.start()
        try:
            stack.wait_ready()
        except StackError as problem:
            raise StackError("\n".join([str(problem), *map("\n".join, last_words(stack))])) from None
        yield stack


def mend(stack: LocalStack) -> None:
    """Whatever a test broke is up again."""
    for part in stack.parts:
        part.send(signal.SIGCONT)
        if part.pid is None:
            part.stop()
            part.start()
    stack.wait_ready()


def last_words(stack: LocalStack) -> list[tuple[str, str]]:
    tails = (part.log_text().splitlines()[-LAST_LINES:] for part in stack.parts)
    return [(f"end of {part.name}'s log", "\n".join(tail)) for part, tail in zip(stack.parts, tails, strict=True)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Function) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds last words to the report of a test that failed."""
    report = yield
    if report.failed:
        for stack in item.funcargs.values():
            if isinstance(stack, LocalStack):
                report.sections += last_words(stack)
    return report
