from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.gateway_client import SETTINGS, Client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    client = Client()
    yield client
    await client.close()


@pytest.fixture
async def strict() -> AsyncIterator[Client]:
    """Of a gateway that refuses empty texts where OpenAI and TEI do."""
    client = Client(SETTINGS.model_copy(update={"empty_texts": "refuse"}))
    yield client
    await client.close()
