from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from embedding_common.contract import ListedModel, ModelCard, ModelList
from embedding_service.core.catalog import MAX_SPACES, Catalog
from embedding_service.errors import DeadlineExceeded, Unavailable, UnknownModel
from tests.support.gateway import CARD, OTHER_CARD, settle

ELSEWHERE = ModelCard("elsewhere", "print-9", 8, 16)


class Sources:
    """Replicas and Redis, as the catalog sees them. A model that has to be loaded waits for `loading`."""

    def __init__(
        self, *, replicas: ModelCard | None, redis: list[ModelCard] | None = None, unloaded: ModelCard | None = None
    ) -> None:
        self.replicas = replicas
        self.unloaded = unloaded
        self.redis = redis or []
        self.probes = 0
        self.loading: asyncio.Future[ModelCard] = asyncio.Future()

    async def fetch(self) -> ModelList:
        if self.replicas is None:
            raise Unavailable("no replica")
        others = [ListedModel(self.unloaded.id, "unloaded")] if self.unloaded else []
        return ModelList(self.replicas.id, [*others, ListedModel(self.replicas.id, "ready", self.replicas)])

    async def probe(self, model_id: str) -> ModelCard:
        self.probes += 1
        return await self.loading

    async def recall(self) -> list[ModelCard]:
        return self.redis

    async def remember(self, cards: list[ModelCard]) -> None:
        self.redis = cards

    def catalog(self, **choices: Any) -> Catalog:
        return Catalog(fetch=self.fetch, probe=self.probe, recall=self.recall, remember=self.remember, **choices)


async def test_the_replicas_card_is_known_at_once_and_kept_in_redis() -> None:
    sources = Sources(replicas=CARD)
    async with sources.catalog() as catalog:
        assert catalog.card(None) == CARD
        assert catalog.reachable
    assert sources.redis == [CARD]


async def test_without_replicas_the_last_cards_are_recalled() -> None:
    async with Sources(replicas=None, redis=[CARD, ELSEWHERE]).catalog() as catalog:
        assert catalog.card(None) == CARD
        assert catalog.card("elsewhere") == ELSEWHERE
        assert not catalog.reachable


async def test_with_neither_every_request_is_told_to_come_back() -> None:
    async with Sources(replicas=None).catalog() as catalog:
        with pytest.raises(Unavailable) as refused:
            catalog.card(None)
    assert refused.value.retry_after_s is not None


async def test_replicas_are_believed_before_redis() -> None:
    async with Sources(replicas=OTHER_CARD, redis=[CARD]).catalog() as catalog:
        assert catalog.card(None) == OTHER_CARD


async def test_another_model_than_those_served_is_unknown() -> None:
    async with Sources(replicas=CARD, unloaded=ELSEWHERE).catalog() as catalog:
        assert catalog.card("model") == CARD
        with pytest.raises(UnknownModel, match="'other' is not served here; available: model, elsewhere"):
            catalog.card("other")


async def test_an_unknown_name_may_mean_the_default_model() -> None:
    async with Sources(replicas=CARD).catalog(unknown="default") as catalog:
        assert catalog.card("other") == CARD


@pytest.mark.parametrize(("name", "model"), [("ada", "model"), ("said", "model"), ("by id", "elsewhere")])
async def test_an_alias_leads_to_a_model(name: str, model: str) -> None:
    aliases = {"ada": "", "said": "default", "by id": "elsewhere", "lost": "gone"}
    async with Sources(replicas=CARD).catalog(aliases=aliases) as catalog:
        catalog.adopt(ELSEWHERE)
        assert (await catalog.learn(name)).id == model
        assert catalog.aliases == ["ada", "said", "by id"]
        with pytest.raises(UnknownModel, match="'lost', an alias of 'gone', is not served here"):
            catalog.card("lost")


async def test_a_model_that_was_never_loaded_is_loaded_once_for_all_who_ask() -> None:
    sources = Sources(replicas=CARD, unloaded=ELSEWHERE)
    async with sources.catalog() as catalog:
        assert catalog.card("elsewhere") is None
        asking = [asyncio.create_task(catalog.learn("elsewhere")) for _ in range(3)]
        await settle()
        sources.loading.set_result(ELSEWHERE)
        assert await asyncio.gather(*asking) == [ELSEWHERE] * 3
        assert catalog.card("elsewhere") == ELSEWHERE
        await catalog._refresh()
    assert sources.probes == 1
    assert sources.redis == [CARD, ELSEWHERE]


async def test_who_waits_for_a_model_waits_no_longer_than_its_own_time() -> None:
    async with Sources(replicas=CARD, unloaded=ELSEWHERE).catalog() as catalog:
        with pytest.raises(DeadlineExceeded):
            await catalog.learn("elsewhere", deadline=time.monotonic() + 0.01)


async def test_a_load_that_failed_is_tried_anew_by_the_next_to_ask() -> None:
    sources = Sources(replicas=CARD, unloaded=ELSEWHERE)
    async with sources.catalog() as catalog:
        sources.loading.set_exception(Unavailable("no memory"))
        for _ in range(2):
            with pytest.raises(Unavailable, match="no memory"):
                await catalog.learn("elsewhere")
    assert sources.probes == 2


async def test_a_load_that_failed_after_everybody_left_troubles_nobody() -> None:
    sources = Sources(replicas=CARD, unloaded=ELSEWHERE)
    async with sources.catalog() as catalog:
        with pytest.raises(DeadlineExceeded):
            await catalog.learn("elsewhere", deadline=time.monotonic())
        sources.loading.set_exception(Unavailable("no memory"))
        await settle()


async def test_a_model_no_longer_listed_is_unknown() -> None:
    sources = Sources(replicas=CARD)
    async with sources.catalog() as catalog:
        catalog.adopt(ELSEWHERE)
        await catalog._refresh()
        with pytest.raises(UnknownModel):
            catalog.card("elsewhere")


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
