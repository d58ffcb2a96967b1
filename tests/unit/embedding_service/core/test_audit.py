"""The check on ourselves: cached vectors computed again, behind the replies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from embedding_common.contract import Lane
from embedding_service.core.audit import Audit
from embedding_service.core.query import Miss, Outcome, Query
from embedding_service.core.singleflight import Flight
from tests.support.gateway import OTHER_CARD, Gateway, settle

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from embedding_service.core.query import Answer, Resolved


class Checked:
    """A gateway that checks one hit in `one_in`, and whose texts "a" to "d" are cached."""

    def __init__(self, one_in: int = 1) -> None:
        self.gateway = Gateway()
        g = self.gateway
        self.audit = Audit(one_in=one_in, compute=g.lanes.compute_aside, metrics=g.metrics)
        g.embedder._audit = self.audit
        g.embedder._hits_to_audit = self.audit.draw_interval()

    async def fill(self) -> None:
        self.gateway.balancer.answers_at_once = True
        await self.ask(*"abcd")
        self.gateway.balancer.answers_at_once = False
        self.gateway.balancer.sent.clear()

    async def ask(self, *texts: str) -> Answer:
        return await self.gateway.embedder.embed(Query(texts=texts, lane=Lane.INTERACTIVE, request_id="r"))

    def spoil(self, text: str) -> None:
        """What L1 holds for a text is no longer its vector."""
        space = self.gateway.catalog.space(self.gateway.catalog.current, None, "right")  # type: ignore[arg-type]
        entry = self.gateway.l1.get(space.name(text))
        assert entry is not None
        entry.vector = np.array([1, -1, 0, 0], "<f4").tobytes()

    def counts(self) -> dict[str, int]:
        return {result: figure.total for result, figure in self.gateway.metrics.drift_checks.items() if figure.total}

    async def close(self) -> None:
        await self.audit.__aexit__()
        await self.gateway.close()


@pytest.fixture
async def checked() -> AsyncIterator[Checked]:
    checked = Checked()
    await checked.fill()
    yield checked
    await checked.close()


async def test_a_hit_is_computed_again_behind_the_reply(checked: Checked) -> None:
    answer = await checked.ask("a")
    assert answer.outcomes == [Outcome.L1]
    await settle()
    [call] = checked.gateway.balancer.waiting
    assert (call.texts, call.headers["x-priority"]) == (["a"], "bulk")
    call.answer()
    await settle()
    assert checked.counts() == {"same": 1}
    assert checked.gateway.metrics.drift_worst.value == 0


async def test_a_vector_that_is_another_is_counted_and_told_without_its_text(
    checked: Checked, caplog: pytest.LogCaptureFixture
) -> None:
    checked.spoil("b")
    await checked.ask("b")
    await settle()
    checked.gateway.balancer.waiting[0].answer()
    await settle()
    assert checked.counts() == {"different": 1}
    assert checked.gateway.metrics.drift_worst.value > 0.1
    assert "a cached vector is not what a replica computes" in caplog.text


async def test_a_check_is_no_traffic(checked: Checked) -> None:
    before = checked.gateway.metrics.totals()
    computed = checked.gateway.metrics.upstream_texts.total
    await checked.ask("a")
    await settle()
    checked.gateway.balancer.waiting[0].answer()
    await settle()
    after = checked.gateway.metrics.totals()
    assert {outcome: after[outcome] - before[outcome] for outcome in Outcome if after[outcome] != before[outcome]} == {
        Outcome.L1: 1
    }
    assert checked.gateway.metrics.upstream_texts.total == computed


async def test_a_spoilt_text_is_found_among_many(checked: Checked) -> None:
    checked.spoil("c")
    for _ in range(60):
        await checked.ask(*"abcd")
        await settle()
        checked.gateway.balancer.waiting[0].answer()
        await settle()
    assert checked.counts()["different"] >= 1
    assert sum(checked.counts().values()) == 60


async def test_one_check_runs_at_a_time(checked: Checked) -> None:
    for text in "abc":
        await checked.ask(text)
        await settle()
    assert len(checked.gateway.balancer.waiting) == 1


async def test_texts_that_were_just_computed_are_not_checked(checked: Checked) -> None:
    checked.gateway.balancer.answers_at_once = True
    await checked.ask("new")
    await settle()
    assert [call.texts for call in checked.gateway.balancer.sent] == [["new"]]


async def test_about_one_hit_in_so_many_is_checked() -> None:
    checked = Checked(one_in=50)
    await checked.fill()
    checked.gateway.balancer.answers_at_once = True
    for _ in range(2000):
        await checked.ask("a")
        await settle()
    assert 20 <= checked.counts()["same"] <= 80
    await checked.close()


async def test_replicas_of_another_model_or_none_at_all_leave_a_check_out(checked: Checked) -> None:
    await checked.ask("a")
    await settle()
    checked.gateway.balancer.waiting[0].answer(OTHER_CARD)
    await settle()
    await checked.ask("a")
    await settle()
    checked.gateway.balancer.waiting[0].break_off()
    await settle()
    assert checked.counts() == {"skipped": 2}


async def test_while_jobs_wait_for_a_replica_nothing_is_checked(checked: Checked) -> None:
    space = checked.gateway.catalog.space(checked.gateway.catalog.current, None, "right")  # type: ignore[arg-type]
    flights: list[Flight[Miss, Resolved]] = [
        Flight(text.encode(), Miss("x" * 60, space, 60, Lane.BULK, "r", 0), lane="bulk", deadline=9e9, ttl_s=0)
        for text in "123"
    ]
    checked.gateway.lanes.send(flights)
    await checked.ask("a")
    await settle()
    assert checked.counts() == {"skipped": 1}
    assert all(call.texts != ["a"] for call in checked.gateway.balancer.sent)
