"""A real stack for each file of tests here; what its parts logged last is shown beside a failure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from local_part import StackError
from local_stack import LocalStack

from tests.stack.client import Client

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

LAST_LINES = 15


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """One for all tests of a file: whoever breaks a part mends it before it ends."""
    with LocalStack(state_dir=tmp_path_factory.mktemp("stack")) as stack:
        stack.start()
        try:
            stack.wait_ready()
        except StackError as problem:
            raise StackError("\n".join([str(problem), *map("\n".join, last_words(stack))])) from None
        yield stack


@pytest.fixture
def client(stack: LocalStack) -> Iterator[Client]:
    client = Client(stack)
    yield client
    client.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Function,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    stack = item.funcargs.get("stack")
    if report.failed and isinstance(stack, LocalStack):
        report.sections += last_words(stack)
    return report


def last_words(stack: LocalStack) -> list[tuple[str, str]]:
    tails = (part.log_text().splitlines()[-LAST_LINES:] for part in stack.parts)
    return [(f"end of {part.name}'s log", "\n".join(tail)) for part, tail in zip(stack.parts, tails, strict=True)]
