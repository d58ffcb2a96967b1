from __future__ import annotations

import asyncio
import gc
import time
import weakref
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from embedding_common import errors
from embedding_common.contract import Lane
from ml_base.models.loading import ModelUnavailableError
from ml_base.models.models import Models
from tests.support.model_server import Clock, FakeBackend, FakeLoader, Notes, loaded, server, sources, until, vector_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from embedding_common.contract import Embedded


class Bench:
    """A default model and a second one that is loaded when it is asked for, over fakes."""

    def __init__(
        self,
        *,
        held: bool = False,
        loading_held: bool = False,
        unload_after_s: float = 0,
        clock: Callable[[], float] = time.monotonic,
        max_batch_texts: int = 16,
    ) -> None:
        self.default = FakeBackend(held=held)
        self.loader = FakeLoader(held=loading_held)
        self.notes = Notes()
        self.models = Models(
            sources("first", "second"),
            preloaded={"first": loaded(self.default, "first")},
            load=self.loader,
            serve=server(clock=clock, max_batch_texts=max_batch_texts),
            observer=self.notes,
            unload_after_s=unload_after_s,
            clock=clock,
        )

    async def embed(self, *texts: str, model: str | None = None, timeout_s: float | None = None) -> Embedded:
        async with self.models.use(model, timeout_s=timeout_s) as served:
            return await served.embed(texts, lane=Lane.BULK)

    def start(self, *texts: str, model: str | None = None) -> asyncio.Task[Embedded]:
        return asyncio.create_task(self.embed(*texts, model=model))

    async def loading(self, times: int = 1) -> None:
        """Until that many loadings have begun."""
        await until(lambda: len(self.loader.asked) == times)

    def listed(self, name: str) -> dict[str, Any]:
        return next(item for item in self.models.listed() if item["id"] == name)


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[Bench]:
    bench = Bench(**options)
    async with bench.models:
        yield bench


async def test_without_a_name_the_default_model_answers() -> None:
    async with serving() as bench:
        reply = await bench.embed("abc")
        assert (reply.card.id, bench.models.default_id, bench.models.ids) == ("first", "first", ["first", "second"])
    assert np.array_equal(reply.vectors, [vector_of("abc")])
    assert bench.loader.asked == []


async def test_a_name_that_is_not_served_is_refused_with_those_that_are() -> None:
    async with serving() as bench:
        with pytest.raises(errors.UnknownModel, match="'third' is not served here; available: first, second"):
            await bench.embed("a", model="third")


async def test_the_first_who_asks_has_a_model_loaded_and_all_who_ask_meanwhile_wait_for_that_one() -> None:
    async with serving(loading_held=True) as bench:
        tasks = [bench.start(letter, model="second") for letter in "abc"]
        await bench.loading()
        assert bench.listed("second")["state"] == "loading"
        bench.loader.finish()
        replies = await asyncio.gather(*tasks)
        await bench.embed("d", model="second")
    assert [reply.card.id for reply in replies] == ["second"] * 3
    assert bench.loader.asked == ["second"]


async def test_the_default_model_answers_while_another_is_loaded() -> None:
    async with serving(loading_held=True) as bench:
        task = bench.start("a", model="second")
        await bench.loading()
        assert (await bench.embed("b")).card.id == "first"
        assert bench.models.unhealthy(stuck_s=0.001) == []
        bench.loader.finish()
        await task


async def test_a_caller_that_leaves_does_not_stop_the_loading() -> None:
    async with serving(loading_held=True) as bench:
        gone, stays = bench.start("a", model="second"), bench.start("b", model="second")
        await bench.loading()
        gone.cancel()
        bench.loader.finish()
        assert (await stays).card.id == "second"
        assert gone.cancelled()


async def test_a_model_is_there_although_the_only_one_who_asked_has_left() -> None:
    async with serving(loading_held=True) as bench:
        gone = bench.start("a", model="second")
        await bench.loading()
        gone.cancel()
        bench.loader.finish()
        await until(lambda: bench.listed("second")["state"] == "ready")


async def test_time_that_runs_out_while_a_model_is_loaded_is_told_and_the_loading_goes_on() -> None:
    async with serving(loading_held=True) as bench:
        with pytest.raises(errors.DeadlineExceeded, match=r"0\.01 s"):
            await bench.embed("a", model="second", timeout_s=0.01)
        bench.loader.finish()
        await until(lambda: bench.listed("second")["state"] == "ready")


async def test_a_failed_loading_is_told_to_all_who_wait_and_tried_again_by_the_next() -> None:
    async with serving(loading_held=True) as bench:
        bench.loader.problem = ModelUnavailableError("model second: no memory left")
        tasks = [bench.start(letter, model="second") for letter in "ab"]
        await bench.loading()
        bench.loader.finish()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert [(type(end), str(end)) for end in ends] == [
            (errors.Unavailable, "model_id: model second: no memory left")
        ] * 2
        bench.loader.problem = None
        bench.loader.finish()
        assert (await bench.embed("c", model="second")).card.id == "second"
    assert bench.loader.asked == ["second", "second"]


async def test_the_list_says_why_a_model_could_not_be_loaded_until_it_is_there() -> None:
    async with serving() as bench:
        bench.loader.problem = ModelUnavailableError("no memory left")
        with pytest.raises(errors.Unavailable) as refused:
            await bench.models.load("second")
        assert refused.value.retry_after_s is not None
        assert (bench.listed("second")["state"], bench.listed("second")["problem"]) == ("failed", "no memory left")
        bench.loader.problem = None
        await bench.models.load("second")
        assert (bench.listed("second")["state"], bench.listed("second")["problem"]) == ("ready", None)


async def test_a_model_that_failed_while_it_was_loaded_is_let_go_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[FakeBackend]] = []

    def half_way(_: object) -> None:
        model = FakeBackend()
        made.append(weakref.ref(model))
        raise RuntimeError("fails in warm-up")

    async with serving() as bench:
        monkeypatch.setattr(bench.models, "_load", half_way)
        gc.disable()
        try:
            with pytest.raises(errors.Unavailable, match="fails in warm-up"):
                await bench.models.load("second")
            await until(lambda: made[0]() is None)
        finally:
            gc.enable()


async def test_a_failed_loading_harms_neither_health_nor_the_default_model() -> None:
    async with serving() as bench:
        bench.loader.problem = ValueError("anything at all")
        with pytest.raises(errors.Unavailable):
            await bench.models.load("second")
        assert bench.models.unhealthy(stuck_s=15) == []
        assert (await bench.embed("a")).card.id == "first"


async def test_a_loaded_model_is_listed_with_all_that_is_known_of_it() -> None:
    async with serving() as bench:
        first, second = bench.models.listed()
        assert (first["card"].id, first["card"].fingerprint) == ("first", "f" * 32)
        assert (first["id"], first["state"], first["problem"]) == ("first", "ready", None)
        assert (first["self_test"], first["slice_tokens"], first["memory_bytes"]) == (None, 64, 1000)
        assert (second["state"], second["card"], second["slice_tokens"]) == ("unloaded", None, None)


async def test_an_unloaded_model_keeps_its_card_in_the_list_and_is_loaded_again_as_the_same() -> None:
    async with serving() as bench:
        before = await bench.embed("a", model="second")
        await bench.models.unload("second")
        item = bench.listed("second")
        assert (item["state"], item["card"], item["memory_bytes"]) == ("unloaded", before.card, None)
        assert bench.notes.in_memory == ["first"]
        after = await bench.embed("a", model="second")
    assert after.card == before.card
    assert bench.loader.asked == ["second", "second"]


async def test_no_thread_holds_an_unloaded_model_when_the_heap_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    async with serving() as bench:
        await bench.embed("a", model="second")
        model = weakref.ref(bench.loader.backends.pop("second"))
        monkeypatch.setattr("ml_base.models.models.release_memory", lambda: held.append((gc.collect(), model())[1]))
        await bench.models.unload("second")
    assert held == [None]


async def test_the_default_model_cannot_be_unloaded() -> None:
    async with serving() as bench:
        with pytest.raises(errors.InvalidRequest, match="model_id: first is the default model"):
            await bench.models.unload("first")
        assert bench.listed("first")["state"] == "ready"


async def test_a_model_in_use_cannot_be_unloaded() -> None:
    async with serving() as bench:
        async with bench.models.use("second"):
            with pytest.raises(errors.InvalidRequest, match="model_id: second answers 1 requests just now"):
                await bench.models.unload("second")
        await bench.models.unload("second")


async def test_unloading_what_is_not_loaded_or_not_served_changes_nothing() -> None:
    async with serving() as bench:
        await bench.models.unload("second")
        with pytest.raises(errors.UnknownModel):
            await bench.models.unload("third")
        assert bench.notes.in_memory == ["first"]


async def test_a_model_that_no_request_asks_for_is_unloaded_in_time_and_the_default_one_never() -> None:
    clock = Clock()
    async with serving(clock=clock, unload_after_s=0.02) as bench:
        await bench.embed("a", model="second")
        clock.now += 0.01
        await asyncio.sleep(0.02)
        assert bench.listed("second")["state"] == "ready"
        clock.now += 1
        await until(lambda: bench.listed("second")["state"] == "unloaded")
        assert bench.listed("first")["state"] == "ready"
        assert (await bench.embed("a", model="second")).card.id == "second"


async def test_a_model_in_use_is_not_unloaded_however_long_that_takes() -> None:
    clock = Clock()
    async with serving(clock=clock, unload_after_s=0.02) as bench:
        async with bench.models.use("second"):
            clock.now += 100
            await asyncio.sleep(0.03)
            assert bench.listed("second")["state"] == "ready"
        await asyncio.sleep(0.03)
        assert bench.listed("second")["state"] == "ready"  # its time counts from the end of its last use


async def test_without_a_time_nothing_is_ever_unloaded() -> None:
    clock = Clock()
    async with serving(clock=clock, unload_after_s=0) as bench:
        await bench.embed("a", model="second")
        clock.now += 1e9
        await asyncio.sleep(0.02)
        assert bench.listed("second")["state"] == "ready"


async def test_two_models_take_turns_on_one_thread() -> None:
    async with serving(held=True, max_batch_texts=1) as bench:
        await bench.models.load("second")
        second = bench.loader.backends["second"].model
        tasks = [bench.start("a", "b"), bench.start("c", "d", model="second")]
        await until(lambda: len(bench.default.model.batches) == 1 and bench.models.waiting(Lane.BULK) == 4)
        assert second.batches == []
        bench.default.model.finish()
        await until(lambda: len(bench.default.model.batches) == 2)
        assert second.batches == [["c"]]
        bench.default.model.finish()
        await asyncio.gather(*tasks)


async def test_it_is_well_when_idle_and_busy_and_in_trouble_when_stuck_or_ended() -> None:
    clock = Clock()
    async with serving(held=True, clock=clock) as bench:
        assert bench.models.unhealthy(stuck_s=15) == []
        task = bench.start("a")
        await until(lambda: len(bench.default.model.batches) == 1)
        assert bench.models.unhealthy(stuck_s=15) == []
        clock.now += 16
        assert bench.models.unhealthy(stuck_s=15) == ["inference stuck for 16 s"]
        assert bench.models.running_for_s() == 16
        bench.default.model.finish()
        await task
        assert bench.models.unhealthy(stuck_s=15) == []
    assert bench.models.unhealthy(stuck_s=15) == ["inference ended"]


async def test_closing_ends_a_loading_and_hangs_no_caller() -> None:
    async with serving(loading_held=True) as bench:
        task = bench.start("a", model="second")
        await bench.loading()
    await asyncio.wait([task], timeout=5)
    assert task.done()
    bench.loader.finish()
