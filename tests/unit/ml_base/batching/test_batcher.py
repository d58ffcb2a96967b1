from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

import numpy as np
import pytest

from embedding_common import errors
from embedding_common.contract import Lane
from ml_base.batching.batcher import WINDOW_TEXTS, Batcher
from ml_base.batching.batches import BatchLimits, Grid
from ml_base.machine.worker import Worker
from tests.support.model_server import POISON, Clock, Model, Notes, Text, until, vector_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray


class Bench:
    """A batcher over a fake model, with everything a test wants to look at."""

    def __init__(
        self,
        *,
        held: bool = False,
        compute: Callable[[Sequence[str]], NDArray[np.float32]] | None = None,
        max_tokens: int = 1000,
        max_queue_texts: int = 2000,
        bulk_share: float = 0.2,
        grid: Grid = Grid(),  # noqa: B008 - frozen
        worker: Worker | None = None,
    ) -> None:
        self.model = Model(held=held)
        self.clock = Clock()
        self.notes = Notes()
        self.worker = worker or Worker("inference", clock=self.clock)
        self.batcher: Batcher[Text] = Batcher(
            compute or self.model,
            worker=self.worker,
            limits=BatchLimits(max_texts=64, max_tokens=max_tokens, patience_s=0.05, grid=grid),
            max_queue_texts=max_queue_texts,
            bulk_share=bulk_share,
            observer=self.notes,
            clock=self.clock,
        )

    async def __aenter__(self) -> Self:
        await self.worker.__aenter__()
        await self.batcher.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.batcher.__aexit__()
        await self.worker.__aexit__()

    async def embed(self, *texts: str, lane: Lane = Lane.BULK, deadline: float = float("inf")) -> NDArray[np.float32]:
        with self.batcher.admit(len(texts), lane=lane, deadline=deadline) as job:
            job.put([Text(text) for text in texts])
            return await job.vectors()

    def start(
        self, *texts: str, lane: Lane = Lane.BULK, deadline: float = float("inf")
    ) -> asyncio.Task[NDArray[np.float32]]:
        return asyncio.create_task(self.embed(*texts, lane=lane, deadline=deadline))

    async def running(self, batches: int = 1) -> None:
        """Until that many batches have been started."""
        await until(lambda: len(self.model.batches) >= batches)

    def outcomes(self) -> int:
        """Texts that ended, one way or the other."""
        return sum(report.texts for report in self.notes.reports) + sum(texts for _, texts in self.notes.drops)


async def test_row_i_is_the_vector_of_text_i() -> None:
    texts = [f"{chr(97 + i % 26)}{'x' * (i * 7 % 31)}" for i in range(300)]
    bench = Bench(max_tokens=64)
    async with bench:
        vectors = await bench.embed(*texts)
    assert np.array_equal(vectors, [vector_of(text) for text in texts])


async def test_an_idle_model_starts_at_once_with_whatever_waits() -> None:
    bench = Bench(held=True)
    async with bench:
        task = bench.start("a")
        await bench.running()
        assert bench.model.batches == [["a"]]
        bench.model.finish()
        await task


async def test_requests_that_arrive_while_it_computes_share_the_next_batch() -> None:
    bench = Bench(held=True)
    async with bench:
        tasks = [bench.start("a")]
        await bench.running()
        tasks += [bench.start("b"), bench.start("c", "d")]
        await until(lambda: bench.batcher.reserved(Lane.BULK) == 4)
        bench.model.finish(2)
        await asyncio.gather(*tasks)
    assert bench.model.batches == [["a"], ["b", "c", "d"]]


async def test_interactive_texts_overtake_bulk_texts_that_wait() -> None:
    bench = Bench(held=True, max_tokens=2)
    async with bench:
        tasks = [bench.start("a", "b", "c", "d", "e", "f")]
        await bench.running()
        tasks.append(bench.start("q", lane=Lane.INTERACTIVE))
        await until(lambda: bench.batcher.reserved(Lane.INTERACTIVE) == 1)
        bench.model.finish(9)
        await asyncio.gather(*tasks)
    assert bench.model.batches[1] == ["q"]


async def test_bulk_keeps_its_share_of_batches_under_a_flood_of_queries() -> None:
    bench = Bench(held=True, max_tokens=1, bulk_share=0.25)
    async with bench:
        tasks = [bench.start(*"abcdefgh"), bench.start(*"QRSTUVWXYZ", lane=Lane.INTERACTIVE)]
        await until(lambda: len(bench.model.batches) == 1 and bench.batcher.reserved(Lane.INTERACTIVE) == 10)
        bench.model.finish(18)
        await asyncio.gather(*tasks)
    order = "".join(batch[0] for batch in bench.model.batches)
    assert sum(letter.islower() for letter in order[:12]) in {3, 4}


async def test_a_text_that_fits_badly_is_passed_over_only_as_long_as_the_patience() -> None:
    """Short texts keep coming; the long one has had its 50 ms after the second batch, and leads the third."""
    bench = Bench(held=True, max_tokens=8)
    async with bench:
        tasks = [bench.start("a")]
        await bench.running()
        tasks += [bench.start("b"), bench.start("long" * 2), bench.start("c"), bench.start("d")]
        await until(lambda: bench.batcher.reserved(Lane.BULK) == 5)
        bench.model.finish()
        await bench.running(2)
        assert sorted(bench.model.batches[1]) == ["b", "c", "d"]
        tasks += [bench.start("e")]
        bench.clock.now += 0.06
        bench.model.finish()
        await bench.running(3)
        assert bench.model.batches[2] == ["longlong"]
        bench.model.finish(2)
        await asyncio.gather(*tasks)


async def test_a_failed_batch_fails_only_the_texts_that_cannot_be_computed() -> None:
    bench = Bench(held=True)
    async with bench:
        first = bench.start("a")
        await bench.running()
        good, bad = bench.start("b", "c"), bench.start("d", POISON)
        await until(lambda: bench.batcher.reserved(Lane.BULK) == 5)
        bench.model.finish(9)
        assert np.array_equal(await good, [vector_of("b"), vector_of("c")])
        with pytest.raises(errors.InferenceFailed, match="ValueError"):
            await bad
        await first
        assert bench.batcher.reserved(Lane.BULK) == 0
    assert bench.notes.reports[1].failed == 1


async def test_a_backend_that_returns_too_few_vectors_is_caught_and_the_log_names_both_counts(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Bench(compute=lambda _: np.zeros((1, 4), np.float32))
    async with bench:
        assert (await bench.embed("a", "b")).shape == (2, 4)  # one by one it is right
    assert "1 vectors for 2 texts" in caplog.text


@pytest.mark.parametrize("value", [np.nan, np.inf])
async def test_a_vector_that_is_not_finite_fails_its_request(value: float) -> None:
    bench = Bench(compute=lambda texts: np.full((len(texts), 4), value, np.float32))
    async with bench:
        with pytest.raises(errors.InferenceFailed):
            await bench.embed("a")


async def test_even_a_model_that_raises_system_exit_leaves_the_batcher_alive() -> None:
    def leave(texts: Sequence[str]) -> NDArray[np.float32]:
        if texts == ["bad"]:
            raise SystemExit
        return np.stack([vector_of(text) for text in texts])

    bench = Bench(compute=leave)
    async with bench:
        with pytest.raises(errors.InferenceFailed):
            await bench.embed("bad")
        assert np.array_equal(await bench.embed("good"), [vector_of("good")])


async def test_a_full_lane_refuses_with_a_time_to_come_back() -> None:
    bench = Bench(held=True, max_queue_texts=3)
    async with bench:
        task = bench.start("a", "b")
        await bench.running()
        with pytest.raises(errors.Overloaded) as refused:
            await bench.embed("c", "d")
        assert refused.value.retry_after_s == 1.0
        assert (refused.value.limit, refused.value.value) == (3, 2)
        assert bench.notes.refusals == [(Lane.BULK, 2)]
        bench.model.finish(2)
        await task
        assert len(await bench.embed("c")) == 1


async def test_the_time_to_come_back_follows_the_measured_drain_rate() -> None:
    bench = Bench(held=True, max_queue_texts=40, max_tokens=1)
    async with bench:
        task = bench.start(*"x" * 40)
        await bench.running()
        bench.clock.now += 0.5  # one text took half a second
        bench.model.finish()
        await bench.running(2)
        with pytest.raises(errors.Overloaded) as refused:
            await bench.embed("c", "d")
        assert refused.value.retry_after_s == pytest.approx(39 * 0.5)
        task.cancel()
        bench.model.finish(40)


async def test_a_full_bulk_lane_leaves_room_for_queries() -> None:
    bench = Bench(held=True, max_queue_texts=2)
    async with bench:
        tasks = [bench.start("a", "b"), bench.start("q", lane=Lane.INTERACTIVE)]
        await until(lambda: bench.batcher.reserved(Lane.INTERACTIVE) == 1)
        bench.model.finish(9)
        await asyncio.gather(*tasks)


async def test_what_can_never_fit_is_told_so() -> None:
    bench = Bench(max_queue_texts=2)
    async with bench:
        with pytest.raises(errors.BodyTooLarge, match="at most 2 texts fit the queue, got 3"):
            await bench.embed("a", "b", "c")


async def test_texts_of_a_caller_that_left_are_never_computed() -> None:
    bench = Bench(held=True)
    async with bench:
        first = bench.start("a")
        await bench.running()
        gone, stays = bench.start("b", "c"), bench.start("d")
        await until(lambda: bench.batcher.reserved(Lane.BULK) == 4)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert bench.batcher.reserved(Lane.BULK) == 2
        bench.model.finish(2)
        await asyncio.gather(first, stays)
    assert bench.model.batches == [["a"], ["d"]]
    assert bench.notes.drops == [(Lane.BULK, 2)]


async def test_texts_that_run_when_their_caller_leaves_keep_their_room_until_they_are_done() -> None:
    bench = Bench(held=True)
    async with bench:
        gone = bench.start("a")
        await bench.running()
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert bench.batcher.reserved(Lane.BULK) == 1
        bench.model.finish()
        await until(lambda: bench.batcher.reserved(Lane.BULK) == 0)
    assert (bench.outcomes(), bench.notes.drops) == (1, [])


async def test_a_text_whose_time_is_over_is_never_computed() -> None:
    bench = Bench(held=True)
    async with bench:
        first = bench.start("a")
        await bench.running()
        late = bench.start("b", deadline=bench.clock.now + 1)
        await until(lambda: bench.batcher.reserved(Lane.BULK) == 2)
        bench.clock.now += 2
        bench.model.finish(2)
        with pytest.raises(errors.DeadlineExceeded):
            await late
        await first
    assert bench.model.batches == [["a"]]


async def test_a_request_that_is_tokenized_in_parts_is_computed_in_parts() -> None:
    bench = Bench(held=True)
    async with bench:
        with bench.batcher.admit(2, lane=Lane.BULK) as job:
            job.put([Text("a")])
            await bench.running()
            job.put([Text("b")])
            bench.model.finish(2)
            assert np.array_equal(await job.vectors(), [vector_of("a"), vector_of("b")])
    assert bench.model.batches == [["a"], ["b"]]


async def test_closing_tells_every_caller_that_waits_and_hangs_none() -> None:
    bench = Bench(held=True)
    async with bench:
        tasks = [bench.start("a"), bench.start("b")]
        await bench.running()
    bench.model.finish(9)
    assert all(isinstance(end, errors.Unavailable) for end in await asyncio.gather(*tasks, return_exceptions=True))
    with pytest.raises(errors.Unavailable):
        await bench.embed("c")


async def test_an_observer_that_fails_ends_the_batcher_and_hangs_no_caller() -> None:
    bench = Bench(held=True)
    bench.notes.batch_done = None  # type: ignore[assignment, method-assign]
    async with bench:
        tasks = [bench.start("a"), bench.start("b" * 2000)]
        await bench.running()
        await until(lambda: bench.batcher.reserved(Lane.BULK) == 2)
        bench.model.finish()
        assert len(await tasks[0]) == 1
        with pytest.raises(errors.Unavailable):
            await tasks[1]
        assert not bench.batcher.alive


async def test_the_age_of_the_running_batch_is_known_and_zero_when_idle() -> None:
    bench = Bench(held=True)
    async with bench:
        assert bench.worker.running_for_s() == 0
        task = bench.start("a")
        await bench.running()
        bench.clock.now += 7
        assert bench.worker.running_for_s() == 7
        assert repr(bench.batcher) == "<Batcher interactive=0 bulk=1 running=True batches=0>"
        bench.model.finish()
        await task
        assert bench.worker.running_for_s() == 0


async def test_every_admitted_text_ends_computed_failed_or_dropped_and_no_room_leaks() -> None:
    bench = Bench(max_tokens=40)
    async with bench:
        tasks = [
            bench.start(*(POISON if i % 9 == 3 and j == 2 else "t" * (1 + j) for j in range(6))) for i in range(60)
        ]
        for task in tasks[::5]:
            task.cancel()
        await asyncio.sleep(0)
        for task in tasks[1::5]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await until(lambda: bench.batcher.reserved(Lane.BULK) == 0)
        started = 48 * 6  # a task cancelled before its first step never asks for room
        assert bench.outcomes() == started


async def test_a_long_queue_is_looked_at_through_a_window_and_still_comes_out_whole() -> None:
    texts = [f"{i:04d}" for i in range(WINDOW_TEXTS * 4)]
    bench = Bench(max_tokens=160)
    async with bench:
        vectors = await bench.embed(*texts)
    assert np.array_equal(vectors, [vector_of(text) for text in texts])


async def test_on_a_grid_what_is_reported_as_computed_counts_its_padding() -> None:
    bench = Bench(held=True, grid=Grid((8, 16)))
    async with bench:
        tasks = [bench.start("a")]
        await bench.running()
        tasks.append(bench.start(*["b" * 3] * 8, "c" * 10))
        await until(lambda: bench.batcher.reserved(Lane.BULK) == 10)
        bench.model.finish(2)
        await asyncio.gather(*tasks)
    assert [(report.tokens, report.padded_tokens) for report in bench.notes.reports] == [(1, 8), (34, 160)]


async def test_a_batch_on_a_grid_stays_within_its_tokens_with_the_rows_that_are_padded() -> None:
    bench = Bench(grid=Grid((8,)), max_tokens=8 * 9)  # nine rows are computed as ten, which is one too many
    async with bench:
        await bench.embed(*["a"] * 27)
    assert {report.texts for report in bench.notes.reports} <= {8, 3}
    assert max(report.padded_tokens for report in bench.notes.reports) <= 8 * 9


async def test_batchers_that_share_a_worker_take_turns() -> None:
    one = Bench(held=True, max_tokens=1)
    other = Bench(max_tokens=1, worker=one.worker)
    async with one, other.batcher:
        tasks = [one.start("a", "b"), other.start("c", "d")]
        await one.running()
        assert other.model.batches == []
        one.model.finish()
        await one.running(2)
        assert other.model.batches == [["c"]]
        one.model.finish()
        await asyncio.gather(*tasks)
