"""A real stack for each file of tests here; what its parts logged last is shown beside a failure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from local_stack.stack import LocalStack

from tests.system.stack.client import Client
from tests.system.stack.running import pytest_runtest_makereport, running

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["pytest_runtest_makereport"]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """One for all tests of a file: whoever breaks a part mends it before it ends."""
    with running(LocalStack(state_dir=tmp_path_factory.mktemp("stack"))) as stack:
        yield stack


@pytest.fixture
def client(stack: LocalStack) -> Iterator[Client]:
    client = Client(stack)
    yield client
    client.close()
