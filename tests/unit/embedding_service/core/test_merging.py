"""Whatever happens in whatever order, text i gets the model's vector of text i, and every text is counted once."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from embedding_common.contract import Lane
from embedding_service.api.render import matrix
from embedding_service.cache.entry import KeySpace, unpack
from embedding_service.core.query import Answer, Outcome, Query
from embedding_service.core.singleflight import State
from embedding_service.errors import Problem
from tests.support.gateway import CARD, OTHER_CARD, Gateway, model, settle, token_count

TEXTS = [f"text {n}" + " long" * (n % 3) * 14 for n in range(8)]
RIGHT = {
    KeySpace(model_id=card.id, fingerprint=card.fingerprint, prompt_name=None, prompt=prompt, direction=direction).key(
        text
    ): model(text, card, prompt, direction).tobytes()
    for card in (CARD, OTHER_CARD)
    for prompt in ("", "query: ")
    for direction in ("left", "right")
    for text in TEXTS
}
CARDS = {card.fingerprint: card for card in (CARD, OTHER_CARD)}


class Merging(RuleBasedStateMachine):
    """Requests start, L2 and replicas answer or fail one by one, callers leave, somebody clears: in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.gateway = self.run(self.open())
        self.requests: list[tuple[Query, asyncio.Task[Answer]]] = []
        self.sent = 0

    def run(self, step: Any) -> Any:
        return self.loop.run_until_complete(step)

    async def open(self) -> Gateway:
        gateway = Gateway(l1_entries=5, max_pending_bytes=600)
        gateway.store.gated = True
        return gateway

    @rule(
        texts=st.lists(st.sampled_from(TEXTS), min_size=1, max_size=8),
        lane=st.sampled_from(list(Lane)),
        ttl_s=st.sampled_from([None, 0, 10]),
        bypass=st.booleans(),
        prompt=st.sampled_from([None, "query"]),
        direction=st.sampled_from(["right", "right", "left"]),
    )
    def request(self, texts: list[str], prompt: str | None, **terms: Any) -> None:
        ask = Query(texts=texts, request_id="r", prompt_name=prompt, **terms)

        async def start() -> asyncio.Task[Answer]:
            task = asyncio.create_task(self.gateway.embedder.embed(ask))
            await settle()
            return task

        self.requests.append((ask, self.run(start())))
        self.sent += len(texts)

    @precondition(lambda self: self.gateway.store.reads)
    @rule(which=st.integers(0, 7), works=st.booleans())
    def redis_answers(self, which: int, works: bool) -> None:
        reads = self.gateway.store.reads
        reads[which % len(reads)].set_result(works)
        self.run(settle())

    @precondition(lambda self: self.gateway.balancer.waiting)
    @rule(
        which=st.integers(0, 7),
        how=st.sampled_from(["right", "right", "right", "other model", "500", "503", "broken", "garbage", "one short"]),
    )
    def replica_answers(self, which: int, how: str) -> None:
        calls = self.gateway.balancer.waiting
        call = calls[which % len(calls)]
        match how:
            case "right":
                call.answer(self.gateway.catalog.current or CARD)
            case "other model":
                call.answer(OTHER_CARD if self.gateway.catalog.current == CARD else CARD)
            case "broken":
                call.break_off()
            case "garbage":
                call.send(200, b"\x07" * 100)
            case "one short":
                call.body["texts"] = call.texts[1:] or ["another", "and another"]
                call.answer()
            case status:
                call.answer_json(int(status), error="no")
        self.run(settle())

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 15))
    def caller_leaves(self, which: int) -> None:
        self.requests[which % len(self.requests)][1].cancel()
        self.run(settle())

    @rule()
    def somebody_clears(self) -> None:
        self.run(self.gateway.clear_cache())

    @rule()
    def another_gateway_clears(self) -> None:
        self.gateway.store.epoch += 1_000_000_000
        self.gateway.store.kept.clear()

    @rule()
    def l1_loses_all(self) -> None:
        self.gateway.l1.clear()

    @rule(seconds=st.sampled_from([1, 11, 200]))
    def time_passes(self, seconds: int) -> None:
        self.gateway.now += seconds

    @rule(connected=st.booleans())
    def redis_comes_or_goes(self, connected: bool) -> None:
        self.gateway.store.connected = connected

    @invariant()
    def every_vector_is_its_own_texts(self) -> None:
        for ask, task in self.requests:
            if task.done() and not task.cancelled() and task.exception() is None:
                self.check(ask, task.result())

    def check(self, ask: Query, answer: Answer) -> None:
        card = CARDS[answer.card.fingerprint]
        expected = [model(text, card, card.prompt(ask.prompt_name), ask.direction) for text in ask.texts]
        np.testing.assert_array_equal(matrix(answer.entries), expected)
        assert [entry.tokens for entry in answer.entries] == [token_count(text) for text in ask.texts]
        computed = [text for text, how in zip(ask.texts, answer.outcomes, strict=True) if how is Outcome.UPSTREAM]
        assert len(computed) == len(set(computed)), "a text sent twice is computed once"

    @invariant()
    def failures_are_told_as_problems(self) -> None:
        for _, task in self.requests:
            if task.done() and not task.cancelled() and task.exception() is not None:
                assert isinstance(task.exception(), Problem)

    @invariant()
    def whatever_lies_under_a_key_is_that_keys_vector(self) -> None:
        spaces = self.gateway.catalog._spaces.values()
        right = {space.name(text): RIGHT[space.key(text)] for space in spaces for text in TEXTS}
        for name, entry in self.gateway.l1._items.items():
            assert entry.vector == right[name]  # type: ignore[index]  # L1 knows nothing of its keys but that they hash
        for (_, key), stored in self.gateway.store.kept.items():
            entry = unpack(key, stored)
            assert entry is not None
            assert entry.vector == RIGHT[key]

    @invariant()
    def nothing_flies_that_nobody_waits_for_unless_it_is_paid_for(self) -> None:
        for flight in self.gateway.flights._table.values():
            assert flight.tickets or flight.state is State.DISPATCHED

    def teardown(self) -> None:
        self.run(self.finish())
        gateway = self.gateway
        self.every_vector_is_its_own_texts()
        self.failures_are_told_as_problems()
        assert all(task.done() for _, task in self.requests)
        assert sum(gateway.metrics.totals().values()) == self.sent
        assert len(gateway.flights) == 0
        assert [gateway.admission.pending_bytes(lane) for lane in Lane] == [0, 0]
        self.run(gateway.close())
        self.loop.close()

    async def finish(self) -> None:
        self.gateway.store.gated = False
        while self.gateway.store.reads or self.gateway.balancer.waiting:
            for read in self.gateway.store.reads:
                read.set_result(True)
            for call in self.gateway.balancer.waiting:
                call.answer(self.gateway.catalog.current or CARD)
            await settle()


TestMerging = Merging.TestCase
TestMerging.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
