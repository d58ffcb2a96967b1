"""The rules of the path, one by one; `test_merging` mixes them."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from embedding_common.contract import Lane, ModelCard
from embedding_service.api.render import matrix
from embedding_service.core.catalog import MAX_SPACES
from embedding_service.core.query import Answer, Outcome, Query
from embedding_service.errors import (
    ClientGone,
    DeadlineExceeded,
    InferenceFailed,
    InvalidRequest,
    Overloaded,
    Unavailable,
    UnknownModel,
)
from tests.support.gateway import CARD, OTHER_CARD, Gateway, model, settle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

L1, L2, JOINED, UPSTREAM, FAILED = Outcome


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    gateway = Gateway()
    yield gateway
    await gateway.close()


def ask(*texts: str, **terms: Any) -> Query:
    return Query(texts=texts, request_id="r", **({"lane": Lane.BULK} | terms))


async def start(gateway: Gateway, *texts: str, **terms: Any) -> asyncio.Task[Answer]:
    task = asyncio.create_task(gateway.embedder.embed(ask(*texts, **terms)))
    await settle()
    return task


async def embed(gateway: Gateway, *texts: str, **terms: Any) -> Answer:
    """A whole request, with replicas that answer at once."""
    gateway.balancer.answers_at_once = True
    try:
        return await gateway.embedder.embed(ask(*texts, **terms))
    finally:
        gateway.balancer.answers_at_once = False


def kept_in_l2(gateway: Gateway) -> int:
    return len(gateway.store.kept)


async def test_a_text_is_computed_once_and_then_found_in_l1(gateway: Gateway) -> None:
    assert (await embed(gateway, "a")).outcomes == [UPSTREAM]
    again = await embed(gateway, "a")
    assert again.outcomes == [L1]
    np.testing.assert_array_equal(matrix(again.entries), [model("a", CARD)])
    assert len(gateway.balancer.sent) == 1


async def test_what_l1_lost_is_found_in_l2_and_then_in_l1_again(gateway: Gateway) -> None:
    await embed(gateway, "a")
    gateway.l1.clear()
    assert (await embed(gateway, "a")).outcomes == [L2]
    assert (await embed(gateway, "a")).outcomes == [L1]


async def test_the_reply_is_in_request_order_whatever_came_from_where(gateway: Gateway) -> None:
    await embed(gateway, "in l2")
    gateway.l1.clear()
    await embed(gateway, "in l1")
    texts = ["new", "in l1", "newer", "in l2", "new"]
    answer = await embed(gateway, *texts)
    np.testing.assert_array_equal(matrix(answer.entries), [model(text, CARD) for text in texts])
    assert answer.outcomes == [UPSTREAM, L1, UPSTREAM, L2, JOINED]
    assert answer.cached == 3


async def test_l1_keeps_its_texts_however_many_prompts_a_model_has(gateway: Gateway) -> None:
    gateway.store.connected = False
    card = replace(CARD, prompts={str(number): f"{number}: " for number in range(MAX_SPACES + 1)})
    gateway.catalog.adopt(card)
    gateway.balancer.card = card
    for name in card.prompts:
        await embed(gateway, "a", prompt_name=name)
    assert {(await embed(gateway, "a", prompt_name=name)).outcomes[0] for name in card.prompts} == {L1}


async def test_two_requests_for_one_text_cost_one_computation(gateway: Gateway) -> None:
    first = await start(gateway, "a")
    second = await start(gateway, "a")
    [call] = gateway.balancer.waiting
    call.answer()
    assert (await first).outcomes == [UPSTREAM]
    assert (await second).outcomes == [JOINED]


async def test_a_claimer_that_leaves_harms_no_joiner(gateway: Gateway) -> None:
    gateway.store.gated = True
    claimer = await start(gateway, "a")
    joiner = await start(gateway, "a")
    claimer.cancel()
    await settle()
    gateway.store.reads[0].set_result(True)
    await settle()
    gateway.balancer.waiting[0].answer()
    assert (await joiner).outcomes == [JOINED]


async def test_work_nobody_waits_for_is_dropped_before_it_is_sent(gateway: Gateway) -> None:
    busy = [await start(gateway, f"{n}" * 60) for n in range(2)]
    left = await start(gateway, "left")
    left.cancel()
    await settle()
    for call in list(gateway.balancer.waiting):
        call.answer()
    await asyncio.gather(*busy)
    assert all("left" not in call.texts for call in gateway.balancer.sent)
    assert len(gateway.flights) == 0


async def test_sent_work_is_finished_and_cached_though_its_caller_left(gateway: Gateway) -> None:
    caller = await start(gateway, "a")
    caller.cancel()
    await settle()
    gateway.balancer.waiting[0].answer()
    await settle()
    assert (await embed(gateway, "a")).outcomes == [L1]


async def test_a_failed_piece_fails_its_own_texts_and_caches_nothing(gateway: Gateway) -> None:
    task = await start(gateway, "a" * 60, "b" * 60)
    first, second = gateway.balancer.waiting
    first.answer_json(500, error="no")
    await settle()
    with pytest.raises(InferenceFailed):
        await task
    second.answer()
    await settle()
    assert gateway.l1.get(gateway.catalog.space(CARD, None, "right").name("a" * 60)) is None
    assert (await embed(gateway, "b" * 60)).outcomes == [L1]


async def test_a_deadline_ends_the_wait(gateway: Gateway) -> None:
    with pytest.raises(DeadlineExceeded):
        await gateway.embedder.embed(ask("a", deadline=time.monotonic() + 0.001))


async def test_a_joiner_with_time_left_claims_again_when_the_claimers_time_was_over(gateway: Gateway) -> None:
    hurried = await start(gateway, "a", deadline=time.monotonic() + 0.05)
    patient = await start(gateway, "a")
    with pytest.raises(DeadlineExceeded):
        await hurried
    while len(gateway.balancer.sent) < 2:
        await asyncio.sleep(0.01)
    gateway.balancer.waiting[0].answer()
    assert (await patient).outcomes == [UPSTREAM]


async def test_a_caller_that_hangs_up_ends_its_request(gateway: Gateway) -> None:
    async def gone() -> None:
        return

    with pytest.raises(ClientGone):
        await gateway.embedder.embed(ask("a", caller_gone=gone))


async def test_a_ttl_of_zero_stores_nothing(gateway: Gateway) -> None:
    await embed(gateway, "a", ttl_s=0)
    assert (len(gateway.l1), kept_in_l2(gateway)) == (0, 0)


async def test_joined_requests_store_for_the_longest_ttl(gateway: Gateway) -> None:
    nothing = await start(gateway, "a", ttl_s=0)
    minute = await start(gateway, "a", ttl_s=60)
    gateway.balancer.waiting[0].answer()
    await asyncio.gather(nothing, minute)
    gateway.now += 59
    assert (await embed(gateway, "a")).outcomes == [L1]
    gateway.now += 2
    assert (await embed(gateway, "a")).outcomes == [UPSTREAM]


async def test_l1_forgets_at_its_own_ttl_if_that_is_earlier(gateway: Gateway) -> None:
    await embed(gateway, "a")
    gateway.now += 101  # L1 keeps for 100 s, L2 for 1000 s
    assert (await embed(gateway, "a")).outcomes == [L2]


async def test_a_ttl_says_nothing_about_reading(gateway: Gateway) -> None:
    await embed(gateway, "a")
    assert (await embed(gateway, "a", ttl_s=0)).outcomes == [L1]


async def test_a_bypass_neither_reads_nor_joins_but_stores(gateway: Gateway) -> None:
    await embed(gateway, "a")
    joined_by_nobody = await start(gateway, "b")
    bypass = await start(gateway, "a", "b", bypass=True)
    for call in list(gateway.balancer.waiting):
        call.answer()
    assert (await bypass).outcomes == [UPSTREAM, UPSTREAM]
    assert (await joined_by_nobody).outcomes == [UPSTREAM]
    assert (await embed(gateway, "a", "b")).outcomes == [L1, L1]


async def test_a_fill_under_way_when_somebody_clears_stores_nothing(gateway: Gateway) -> None:
    task = await start(gateway, "a")
    await gateway.clear_cache()
    gateway.balancer.waiting[0].answer()
    assert (await task).outcomes == [UPSTREAM]
    assert (len(gateway.l1), kept_in_l2(gateway)) == (0, 0)


async def test_a_clear_by_another_gateway_empties_l1_at_the_next_look_into_l2(gateway: Gateway) -> None:
    await embed(gateway, "a")
    gateway.store.epoch = gateway.epoch.current + 1
    await embed(gateway, "b")
    assert (await embed(gateway, "a")).outcomes == [UPSTREAM]


async def test_a_clear_that_a_sibling_was_told_of_is_told_to_l2_too(gateway: Gateway) -> None:
    gateway.metrics.board.epoch_cell[0] = 9
    gateway.epoch.catch_up()
    gateway.store.beat()
    assert gateway.store.epoch == 9  # the sibling may be gone before Redis is back


async def test_what_l2_found_before_a_clear_is_not_served_after_it(gateway: Gateway) -> None:
    await embed(gateway, "a")
    gateway.l1.clear()
    gateway.store.gated = True
    task = await start(gateway, "a")
    gateway.epoch.raise_to(gateway.epoch.current + 1)
    gateway.store.reads[0].set_result(True)
    await settle()
    gateway.balancer.waiting[0].answer()
    assert (await task).outcomes == [UPSTREAM]


async def test_a_new_fingerprint_starts_over_and_never_mixes(gateway: Gateway) -> None:
    await embed(gateway, "old")
    task = await start(gateway, "old", "new")
    gateway.balancer.waiting[0].answer(OTHER_CARD)
    await settle()
    gateway.balancer.waiting[0].answer(OTHER_CARD)
    answer = await task
    assert answer.card == OTHER_CARD
    np.testing.assert_array_equal(matrix(answer.entries), [model("old", OTHER_CARD), model("new", OTHER_CARD)])
    assert answer.outcomes == [UPSTREAM, L1], "the first reply was kept under its own fingerprint"


async def test_a_prompt_that_says_something_else_under_the_same_fingerprint_is_another_prompt(gateway: Gateway) -> None:
    await embed(gateway, "a", prompt_name="query")
    reworded = replace(CARD, prompts={"query": "search_query: "})
    task = await start(gateway, "b", prompt_name="query")
    gateway.balancer.waiting[0].answer(reworded)  # kept under its own name, where the second attempt finds it
    gateway.balancer.card = reworded
    await task
    answer = await embed(gateway, "a", "b", prompt_name="query")
    prompt = "search_query: "
    np.testing.assert_array_equal(matrix(answer.entries), [model("a", CARD, prompt), model("b", CARD, prompt)])


async def test_replicas_that_keep_changing_are_told_as_unavailable(gateway: Gateway) -> None:
    task = await start(gateway, "a" * 60, "b" * 60)
    for card in (OTHER_CARD, OTHER_CARD, CARD):
        gateway.balancer.waiting[0].answer(card)
        await settle()
    with pytest.raises(Unavailable, match="changed to another model"):
        await task


async def test_cached_texts_are_served_while_no_replica_is_known_to_be_up(gateway: Gateway) -> None:
    await embed(gateway, "a")
    gateway.catalog.lost()
    assert (await embed(gateway, "a")).outcomes == [L1]


async def test_a_refused_request_leaves_no_trace() -> None:
    gateway = Gateway(max_pending_bytes=100)
    waiting = await start(gateway, "a" * 90)
    with pytest.raises(Overloaded):
        await gateway.embedder.embed(ask("b" * 20, "a" * 90))
    assert len(gateway.flights) == 1
    gateway.balancer.waiting[0].answer()
    await waiting
    await gateway.close()


async def test_cached_and_joined_texts_need_no_room() -> None:
    gateway = Gateway(max_pending_bytes=100)
    await embed(gateway, "c" * 90)
    first = await start(gateway, "a" * 90)
    second = await start(gateway, "a" * 90, "c" * 90)
    gateway.balancer.waiting[0].answer()
    assert (await second).outcomes == [JOINED, L1]
    await first
    await gateway.close()


async def test_a_long_text_takes_only_the_room_of_what_the_model_reads(gateway: Gateway) -> None:
    await embed(gateway, "word " * 100_000)
    assert gateway.admission.pending_bytes(Lane.BULK) == 0


async def test_a_person_who_joins_a_job_takes_its_text_along(gateway: Gateway) -> None:
    busy = [await start(gateway, f"{n}" * 60) for n in range(2)]
    job = await start(gateway, "wanted", "other")
    person = await start(gateway, "wanted", lane=Lane.INTERACTIVE)
    promoted = gateway.balancer.waiting[-1]
    assert (promoted.texts, promoted.headers["x-priority"]) == (["wanted"], "interactive")
    for _ in range(2):
        for call in list(gateway.balancer.waiting):
            call.answer()
        await settle()
    assert (await person).outcomes == [JOINED]
    assert (await job).outcomes == [UPSTREAM, UPSTREAM]
    await asyncio.gather(*busy)
    sent = [text for call in gateway.balancer.sent for text in call.texts]
    assert sent.count("wanted") == 1


async def test_usage_is_the_same_for_a_cached_text_as_for_a_computed_one(gateway: Gateway) -> None:
    texts = ["two words", "word " * 30]
    computed = await embed(gateway, *texts)
    cached = await embed(gateway, *texts)
    assert computed.tokens == cached.tokens == 4 + CARD.max_tokens
    assert computed.truncated == cached.truncated == 1


async def test_every_text_is_counted_once(gateway: Gateway) -> None:
    await embed(gateway, "a", "a", "b")
    await embed(gateway, "a", "c")
    with pytest.raises(UnknownModel):
        await gateway.embedder.embed(ask("a", "b", model_id="unknown"))
    assert gateway.metrics.totals() == {L1: 1, L2: 0, JOINED: 1, UPSTREAM: 3, FAILED: 2}


async def test_an_unknown_prompt_is_refused_with_the_known_ones(gateway: Gateway) -> None:
    with pytest.raises(InvalidRequest, match="has the prompts: query; got 'nope'"):
        await gateway.embedder.embed(ask("a", prompt_name="nope"))


async def test_the_models_default_prompt_is_part_of_the_key(gateway: Gateway) -> None:
    await embed(gateway, "a")
    gateway.catalog.adopt(
        ModelCard(CARD.id, CARD.fingerprint, CARD.dimension, 16, prompts=CARD.prompts, default_prompt_name="query")
    )
    assert (await embed(gateway, "b", prompt_name="query")).outcomes == [UPSTREAM]


async def test_closing_settles_whatever_is_still_under_way() -> None:
    gateway = Gateway(calls=1)
    gateway.store.gated = True
    reading = await start(gateway, "in l2")
    gateway.store.gated = False
    calling, queued = await start(gateway, "sent"), await start(gateway, "queued")
    await gateway.close()
    for task in (reading, calling, queued):
        with pytest.raises(Unavailable, match="shutting down"):
            await task
    assert len(gateway.flights) == 0
