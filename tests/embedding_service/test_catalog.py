from __future__ import annotations

import pytest

from embedding_service.catalog import MAX_SPACES, Catalog
from embedding_service.errors import Unavailable, UnknownModel
from ml_base.wire import ModelCard
from tests.fakes import CARD, OTHER_CARD


class Sources:
    """Replicas and Redis, as the catalog sees them."""

    def __init__(self, *, replicas: ModelCard | None, redis: ModelCard | None = None) -> None:
        self.replicas = replicas
        self.redis = redis

    async def fetch(self) -> ModelCard:
        if self.replicas is None:
            raise Unavailable("no replica")
        return self.replicas

    async def recall(self) -> ModelCard | None:
        return self.redis

    async def remember(self, card: ModelCard) -> None:
        self.redis = card

    def catalog(self) -> Catalog:
        return Catalog(fetch=self.fetch, recall=self.recall, remember=self.remember)


async def test_the_replicas_card_is_known_at_once_and_kept_in_redis() -> None:
    sources = Sources(replicas=CARD)
    async with sources.catalog() as catalog:
        assert catalog.card(None) == CARD
        assert catalog.reachable
    assert sources.redis == CARD


async def test_without_replicas_the_last_card_is_recalled() -> None:
    async with Sources(replicas=None, redis=CARD).catalog() as catalog:
        assert catalog.card(None) == CARD
        assert not catalog.reachable


async def test_with_neither_every_request_is_told_to_come_back() -> None:
    async with Sources(replicas=None).catalog() as catalog:
        with pytest.raises(Unavailable) as refused:
            catalog.card(None)
    assert refused.value.retry_after_s is not None


async def test_replicas_are_believed_before_redis() -> None:
    async with Sources(replicas=OTHER_CARD, redis=CARD).catalog() as catalog:
        assert catalog.card(None) == OTHER_CARD


async def test_another_model_than_the_served_one_is_unknown() -> None:
    async with Sources(replicas=CARD).catalog() as catalog:
        assert catalog.card("model") == CARD
        with pytest.raises(UnknownModel, match="'other' is not served here; available: model"):
            catalog.card("other")


async def test_the_poll_finds_replicas_that_come_later() -> None:
    sources = Sources(replicas=None)
    async with sources.catalog() as catalog:
        sources.replicas = CARD
        await catalog._refresh()
        assert catalog.card(None) == CARD


async def test_key_spaces_are_kept_and_bounded() -> None:
    catalog = Sources(replicas=CARD).catalog()
    assert catalog.space(CARD, None, "right") is catalog.space(CARD, None, "right")
    for number in range(3 * MAX_SPACES):
        catalog.space(ModelCard("model", f"print-{number}", 4, 16), None, "right")
    assert len(catalog._spaces) <= MAX_SPACES
