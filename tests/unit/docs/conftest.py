from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.gateway_client import Client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    client = Client()
    yield client
    await client.close()
