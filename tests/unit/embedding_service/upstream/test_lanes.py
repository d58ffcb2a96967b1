"""Pieces, lanes, repetition: the real queueing over a balancer that answers when the test says so."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

import pytest

from embedding_common.contract import Lane
from embedding_service.core.query import Answer, Query
from embedding_service.errors import (
    DeadlineExceeded,
    InferenceFailed,
    InvalidRequest,
    Overloaded,
    Problem,
    Unavailable,
    UnknownModel,
)
from embedding_service.upstream.calls import REPLICA_HEADER, Broken
from embedding_service.upstream.ejection import EJECT_AFTER
from embedding_service.upstream.lanes import TIDY_CHARS
from embedding_service.upstream.retry import RETRY_BUDGET
from tests.support.gateway import CARD, Call, Gateway, embedded, settle

if TYPE_CHECKING:
    from collections.abc import Callable


async def start(gateway: Gateway, *texts: str, lane: Lane = Lane.BULK, request_id: str = "r") -> asyncio.Task[Answer]:
    task = asyncio.create_task(gateway.embedder.embed(Query(texts=texts, lane=lane, request_id=request_id)))
    await settle()
    return task


async def answer_all(gateway: Gateway) -> None:
    while gateway.balancer.waiting:
        for call in list(gateway.balancer.waiting):
            call.answer()
        await settle()


async def test_misses_leave_at_once_while_a_call_is_free() -> None:
    gateway = Gateway(calls=2)
    await start(gateway, "a")
    await start(gateway, "b")
    assert [call.texts for call in gateway.balancer.waiting] == [["a"], ["b"]]
    await gateway.close()


async def test_misses_of_several_requests_leave_together_when_all_calls_were_busy() -> None:
    gateway = Gateway(calls=1)
    tasks = [await start(gateway, text, request_id=text) for text in "abc"]
    assert [call.texts for call in gateway.balancer.waiting] == [["a"]]
    gateway.balancer.waiting[0].answer()
    await settle()
    [call] = gateway.balancer.waiting
    assert call.texts == ["b", "c"]
    assert call.headers["x-request-id"] == "b,c"
    await answer_all(gateway)
    await asyncio.gather(*tasks)
    await gateway.close()


async def test_a_list_is_cut_into_pieces_of_like_work() -> None:
    gateway = Gateway(calls=9, chunk_bytes=64)
    task = await start(gateway, "a" * 40, "b" * 40, "c" * 20, "d" * 200, "e")
    assert [[text[0] for text in call.texts] for call in gateway.balancer.waiting] == [["a"], ["b", "c"], ["d"], ["e"]]
    await answer_all(gateway)
    await task
    await gateway.close()


@pytest.mark.parametrize("limit", [{"max_texts": 2}, {"max_body_bytes": 6 * 200}], ids=["texts", "bytes"])
async def test_texts_of_several_requests_leave_within_the_limits_of_one(limit: dict[str, int]) -> None:
    gateway = Gateway(calls=1, chunk_bytes=1000, **limit)
    tasks = [await start(gateway, letter * 100) for letter in "abcd"]
    await answer_all(gateway)
    await asyncio.gather(*tasks)
    assert ["".join(text[0] for text in call.texts) for call in gateway.balancer.sent] == ["a", "bc", "d"]
    await gateway.close()


async def test_texts_of_callers_who_gave_up_are_not_held_while_the_replicas_hang() -> None:
    gateway = Gateway(calls=1)
    await start(gateway, "hangs")
    for number in range(30):
        task = await start(gateway, str(number) * (TIDY_CHARS // 5))
        task.cancel()
        await settle()
    waiting = await start(gateway, "waits")
    assert len(gateway.lanes._lanes[Lane.BULK].queue) <= 6  # texts of TIDY_CHARS, and the one that waits
    await answer_all(gateway)
    assert len((await waiting).entries) == 1
    await gateway.close()


async def test_a_busy_bulk_lane_does_not_hold_up_a_person() -> None:
    gateway = Gateway(calls=1)
    await start(gateway, "job")
    await start(gateway, "job 2")
    await start(gateway, "person", lane=Lane.INTERACTIVE)
    assert [call.texts for call in gateway.balancer.waiting] == [["job"], ["person"]]
    await gateway.close()


@pytest.mark.parametrize(
    "fail",
    [
        pytest.param(lambda call: call.break_off(), id="the connection breaks"),
        pytest.param(lambda call: call.answer_json(503, error="draining"), id="503"),
        pytest.param(lambda call: call.answer_json(502, error="gone"), id="502"),
        pytest.param(lambda call: call.send(200, b"garbage"), id="garbage"),
    ],
)
async def test_sent_work_is_repeated_once(fail: Callable[[Any], None]) -> None:
    gateway = Gateway()
    task = await start(gateway, "a")
    fail(gateway.balancer.waiting[0])
    await settle()
    gateway.balancer.waiting[0].answer()
    assert len((await task).entries) == 1
    await gateway.close()


def answer_as(call: Call, name: str) -> None:
    call.send(200, embedded(call.texts, CARD).to_bytes(), {REPLICA_HEADER: name})


async def known(gateway: Gateway, *names: str) -> None:
    """Replicas of these names have each answered well."""
    for name in names:
        task = await start(gateway, f"from {name}")
        answer_as(gateway.balancer.waiting[0], name)
        await task


def nonsense(call: Call) -> None:
    call.send(200, b"garbage", {REPLICA_HEADER: "liar"})


def failing(call: Call) -> None:
    call.send(500, b'{"error": "broken"}', {REPLICA_HEADER: "liar"})


def cut(call: Call) -> None:
    call.reply.set_exception(Broken(Unavailable("a reply was cut short"), "liar"))


@pytest.mark.parametrize("badly", [nonsense, failing, cut])
async def test_what_one_replica_spoils_another_is_named_for(badly: Callable[[Call], None]) -> None:
    gateway = Gateway()
    await known(gateway, "liar", "good")
    for number in range(EJECT_AFTER):
        task = await start(gateway, f"spoiled {number}")
        badly(gateway.balancer.waiting[0])
        await settle()
        assert gateway.balancer.waiting[0].headers[REPLICA_HEADER] == "good"
        answer_as(gateway.balancer.waiting[0], "good")
        await task
    assert gateway.metrics.unusable_replies.own == EJECT_AFTER
    assert len(gateway.retry.ejections) == 1
    await start(gateway, "later")
    assert gateway.balancer.waiting[0].headers[REPLICA_HEADER] == "good"
    await gateway.close()


async def test_while_all_is_well_nobody_is_named() -> None:
    gateway = Gateway()
    await known(gateway, "a", "b", "c")
    assert not [call for call in gateway.balancer.sent if REPLICA_HEADER in call.headers]
    await gateway.close()


async def test_a_text_that_every_replica_fails_at_ejects_none() -> None:
    gateway = Gateway()
    await known(gateway, "a", "b")
    for number in range(2 * EJECT_AFTER):
        task = await start(gateway, f"poison {number}")
        for name in ("a", "b"):
            gateway.balancer.waiting[0].send(500, b"{}", {REPLICA_HEADER: name})
            await settle()
        with pytest.raises(InferenceFailed):
            await task
    assert len(gateway.retry.ejections) == 0
    await gateway.close()


@pytest.mark.parametrize("status", [404, 422, 429, 503, 504])
async def test_a_refusal_is_no_bad_answer(status: int) -> None:
    gateway = Gateway()
    await known(gateway, "a", "b")
    for number in range(2 * EJECT_AFTER):
        task = await start(gateway, f"refused {number}")
        while gateway.balancer.waiting:
            gateway.balancer.waiting[0].send(status, b"{}", {REPLICA_HEADER: "a"})
            await settle()
        assert isinstance(task.exception(), Problem)
    assert (len(gateway.retry.ejections), gateway.metrics.unusable_replies.own) == (0, 0)
    await gateway.close()


async def test_a_replica_that_lists_models_well_but_computes_nonsense_stays_ejected() -> None:
    gateway = Gateway()
    await known(gateway, "liar", "good")
    for _ in range(EJECT_AFTER):
        gateway.retry.ejections.unusable("liar")
    gateway.balancer.list_headers = {REPLICA_HEADER: "liar"}
    await gateway.replicas.models()
    assert len(gateway.retry.ejections) == 1
    await gateway.close()


async def test_a_busy_lane_sends_nothing_that_would_be_back_too_late() -> None:
    gateway = Gateway(calls=2)
    gateway.lanes._lanes[Lane.BULK].took(100)  # a call takes seconds now
    soon = time.monotonic() + 1
    tries = asyncio.create_task(
        gateway.embedder.embed(Query(texts=("idle",), lane=Lane.BULK, request_id="r", deadline=soon))
    )
    await settle()
    with pytest.raises(DeadlineExceeded, match="that a call takes now"):
        await gateway.embedder.embed(Query(texts=("busy",), lane=Lane.BULK, request_id="r", deadline=soon))
    waits = await start(gateway, "has time")
    await answer_all(gateway)
    await asyncio.gather(tries, waits)
    assert [call.texts for call in gateway.balancer.sent] == [["idle"], ["has time"]]
    await gateway.close()


async def test_what_a_person_joined_is_not_late_by_how_long_jobs_take() -> None:
    gateway = Gateway(calls=2)
    for number in range(4):
        await start(gateway, f"busy {number}", lane=list(Lane)[number % 2])
    soon = time.monotonic() + 1
    both = []
    for lane in (Lane.BULK, Lane.INTERACTIVE):
        ask = Query(texts=("shared",), lane=lane, request_id="r", deadline=soon)
        both.append(asyncio.create_task(gateway.embedder.embed(ask)))
        await settle()
    gateway.lanes._lanes[Lane.BULK].took(100)  # a call takes seconds now
    next(call for call in gateway.balancer.waiting if call.headers["x-priority"] == "bulk").answer()
    await settle()
    await answer_all(gateway)
    assert [len(answer.entries) for answer in await asyncio.gather(*both)] == [1, 1]
    assert gateway.balancer.sent[-1].headers["x-priority"] == "interactive"
    await gateway.close()


async def test_work_is_not_repeated_twice() -> None:
    gateway = Gateway()
    task = await start(gateway, "a")
    for _ in range(2):
        gateway.balancer.waiting[0].break_off()
        await settle()
    with pytest.raises(Unavailable):
        await task
    assert len(gateway.balancer.sent) == 2
    await gateway.close()


async def test_an_outage_is_not_multiplied_past_the_retry_budget() -> None:
    gateway = Gateway()
    requests = 100
    for number in range(requests):
        task = await start(gateway, f"text {number}")
        while not task.done():
            gateway.balancer.waiting[0].break_off()
            await settle()
        assert isinstance(task.exception(), Unavailable)
    assert len(gateway.balancer.sent) <= requests + RETRY_BUDGET + requests / 10
    await gateway.close()


@pytest.mark.parametrize(
    ("status", "problem"),
    [
        (400, InvalidRequest),
        (404, InvalidRequest),
        (413, InvalidRequest),
        (422, InvalidRequest),
        (429, Overloaded),
        (500, InferenceFailed),
        (504, DeadlineExceeded),
    ],
)
async def test_a_replicas_refusal_is_passed_on_and_not_repeated(status: int, problem: type[Problem]) -> None:
    gateway = Gateway()
    task = await start(gateway, "a")
    gateway.balancer.waiting[0].answer_json(status, error="texts[0]: no", field="texts[0]", limit=3, value=4)
    with pytest.raises(problem, match=r"texts\[0\]: no"):
        await task
    assert len(gateway.balancer.sent) == 1
    await gateway.close()


async def test_one_call_is_bounded_in_time() -> None:
    gateway = Gateway(upstream_timeout_s=0.01)
    task = await start(gateway, "a")
    with pytest.raises(DeadlineExceeded, match="no answer from a replica within"):
        await task
    await gateway.close()


async def test_the_replica_is_told_how_long_it_has() -> None:
    gateway = Gateway(upstream_timeout_s=10)
    await start(gateway, "a")
    assert 9_000 < int(gateway.balancer.waiting[0].headers["x-request-timeout-ms"]) <= 10_000
    await gateway.close()


@pytest.mark.parametrize(
    "listed", [b"{", b"[]", b'{"default": "a", "models": []}', b'{"default": "a", "models": [{"id": "a"}]}']
)
async def test_an_unusable_list_of_models_is_as_good_as_none(listed: bytes) -> None:
    gateway = Gateway()
    gateway.balancer.listed = listed
    with pytest.raises(InferenceFailed):
        await gateway.replicas.models()


async def test_a_model_the_replicas_do_not_have_is_unknown() -> None:
    gateway = Gateway()
    gateway.balancer.fails_with = (404, b'{"error": "model_id: gone", "field": "model_id"}')
    with pytest.raises(UnknownModel, match="gone"):
        await gateway.replicas.probe("gone")


@pytest.mark.parametrize("answer", [(503, b"{}"), (200, b"nonsense")])
async def test_an_outage_under_load_leaves_a_few_lines_in_the_log(
    answer: tuple[int, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    gateway = Gateway()
    gateway.balancer.fails_with = answer
    tasks = [await start(gateway, str(number)) for number in range(500)]
    await asyncio.gather(*tasks, return_exceptions=True)
    assert len(gateway.balancer.sent) >= 500
    assert len(caplog.records) < 50
