"""Requests in, batches out: bounded lanes of waiting texts before the thread that computes.

A batch is what the model computes in one call. An idle model starts at once with what waits; while it computes, texts
gather. Everything here runs on the event loop and changes state only between awaits, so there are no locks; only
`compute` runs in the worker's thread.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, Self, TypeVar

import numpy as np

from embedding_common import errors
from embedding_common.contract import Lane
from ml_base.batching.batches import BatchLimits, BatchReport, choose_lane, pick

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from ml_base.machine.worker import Worker

log = logging.getLogger(__name__)

WINDOW_TEXTS = 256
"""How many of the oldest texts of a lane a batch is picked from: enough for many batches, and sorting takes 0.1 ms."""

MAX_RETRY_AFTER_S = 60.0
_RATE_WEIGHT = 0.1  # weight of the newest batch in the moving drain rate: about the last ten count


class Item(Protocol):
    """A tokenized text."""

    @property
    def length(self) -> int:
        """The tokens to compute."""


T = TypeVar("T", bound=Item)


class Observer(Protocol):
    """Counts what happens. Each admitted text ends in a batch (computed or failed) or is dropped."""

    def batch_done(self, report: BatchReport) -> None: ...
    def refused(self, lane: Lane, texts: int) -> None: ...
    def dropped(self, lane: Lane, texts: int) -> None: ...
    def truncated(self, texts: int) -> None: ...


class Job(Generic[T]):
    """One request. It has room in its lane from admission to the end of its `with` block; rows fill batch by batch."""

    def __init__(self, batcher: Batcher[T], lane: Lane, texts: int, deadline: float) -> None:
        self.lane = lane
        self.left = texts  # texts admitted and neither settled nor dropped
        self.running = 0  # how many of those are in the batch that runs now
        self.deadline = deadline
        self.passed_at = math.inf  # when a younger job was first served before this one
        self._batcher = batcher
        self._texts = texts
        self._put = 0
        self._rows: NDArray[np.float32] | None = None  # made with the first batch, which shows the dimension
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._batcher.release(self)
        self._done.cancel()  # texts of this job that still wait are dropped when their turn comes

    @property
    def done(self) -> bool:
        return self._done.done()

    def put(self, items: Sequence[T]) -> None:
        """Queues the next texts of this request, in order; they may be computed from now on."""
        self._batcher.enqueue(self, items, first_row=self._put)
        self._put += len(items)

    async def vectors(self) -> NDArray[np.float32]:
        """Returns float32 [texts, dimension]; row i belongs to the i-th text put. Raises the first text's `Problem`."""
        await self._done
        assert self._rows is not None  # noqa: S101 - `fill` made it before it settled the future
        return self._rows

    def fill(self, row: int, vector: NDArray[np.float32]) -> None:
        if self._rows is None:
            self._rows = np.empty((self._texts, len(vector)), np.float32)
        self._rows[row] = vector
        if self.left == 0 and not self._done.done():
            self._done.set_result(None)

    def fail(self, problem: errors.Problem) -> None:
        if not self._done.done():
            self._done.set_exception(problem)
            self._done.exception()  # marks it as seen: a job whose caller left before awaiting it must not warn


@dataclass(slots=True, eq=False)
class _Waiting(Generic[T]):
    job: Job[T]
    row: int
    item: T
    length: int  # tokens, padded to the grid
    since: float

    @property
    def passed_at(self) -> float:
        return self.job.passed_at


class _LaneQueue(Generic[T]):
    """The texts of one lane, oldest first: a window that batches are picked from, and the rest behind it."""

    def __init__(self) -> None:
        self.reserved = 0  # texts admitted and not yet settled, waiting, running or still being tokenized
        self._window: list[_Waiting[T]] = []
        self._behind: deque[_Waiting[T]] = deque()

    def append(self, waiting: _Waiting[T]) -> None:
        self._behind.append(waiting)

    def window(self, now: float) -> list[_Waiting[T]]:
        """Returns the oldest live texts. Those of a job that has ended or expired are dropped here, uncomputed."""
        self._window = [waiting for waiting in self._window if _alive(waiting.job, now)]
        while self._behind and len(self._window) < WINDOW_TEXTS:
            waiting = self._behind.popleft()
            if _alive(waiting.job, now):
                self._window.append(waiting)
        return self._window

    def take(self, now: float, limits: BatchLimits) -> list[_Waiting[T]]:
        """Takes the next batch out of the window, and notes whose texts it passed over."""
        picked = pick(self._window, now=now, limits=limits)
        batch = [self._window[position] for position in picked]
        for waiting in batch:
            waiting.job.running += 1
        chosen = set(picked)
        self._note_passed_over(chosen, now)
        self._window = [waiting for position, waiting in enumerate(self._window) if position not in chosen]
        return batch

    def _note_passed_over(self, picked: set[int], now: float) -> None:
        """A job is passed over when a text behind its own, of another job, is taken."""
        behind: set[Job[T]] = set()  # jobs with a picked text behind the current position
        for position in range(max(picked), -1, -1):
            job = self._window[position].job
            if position in picked:
                behind.add(job)
            elif behind - {job}:
                job.passed_at = min(job.passed_at, now)


def _alive(job: Job[T], now: float) -> bool:
    if job.done:
        return False
    if now >= job.deadline:
        job.fail(errors.DeadlineExceeded("the time limit passed before all texts were computed"))
        return False
    return True


class Batcher(Generic[T]):
    """Gives batches to `worker`, as an async context manager; texts enter through `admit`.

    Models that share a worker take turns, a batch each.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[T]], NDArray[np.float32]],
        *,
        worker: Worker,
        limits: BatchLimits,
        max_queue_texts: int,
        bulk_share: float,
        observer: Observer,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._compute = compute
        self._limits = limits
        self._max_queue_texts = max_queue_texts
        self._bulk_share = bulk_share
        self._observer = observer
        self._clock = clock
        self._worker = worker
        self._lanes: dict[Lane, _LaneQueue[T]] = {lane: _LaneQueue() for lane in Lane}
        self._jobs: set[Job[T]] = set()
        self._bulk_credit = 0.0
        self._texts_per_s = 0.0  # moving drain rate; 0 until the first batch
        self._batches = 0
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        counts = " ".join(f"{lane}={queue.reserved}" for lane, queue in self._lanes.items())
        return f"<Batcher {counts} running={self._worker.running_since is not None} batches={self._batches}>"

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._serve(), name="batcher")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    @property
    def alive(self) -> bool:
        """Whether it computes: False before it has started, and once it has ended or broken."""
        return self._task is not None and not self._task.done()

    def reserved(self, lane: Lane) -> int:
        """Returns the number of texts admitted to a lane and not yet settled."""
        return self._lanes[lane].reserved

    def admit(self, texts: int, *, lane: Lane, deadline: float = math.inf) -> Job[T]:
        """Returns a job with room for so many texts, until `deadline` on the batcher's clock.

        Raises `Overloaded`, `BodyTooLarge` or `Unavailable`.
        """
        if not self.alive:
            raise errors.Unavailable("the model is not running")
        queue = self._lanes[lane]
        if texts > self._max_queue_texts or queue.reserved + texts > self._max_queue_texts:
            self._observer.refused(lane, texts)
            raise self._refusal(texts, lane)
        job = Job(self, lane, texts, deadline)
        queue.reserved += texts
        self._jobs.add(job)
        return job

    def enqueue(self, job: Job[T], items: Sequence[T], *, first_row: int) -> None:
        now = self._clock()
        for row, item in enumerate(items, first_row):
            length = self._limits.grid.length(item.length)
            self._lanes[job.lane].append(_Waiting(job, row, item, length, now))
        self._arrived.set()

    def release(self, job: Job[T]) -> None:
        """Frees the room of the texts that still wait; called at the end of every job, however it ends.

        Texts that run keep their room until their batch is done: they are computed, though no caller waits for them.
        """
        self._jobs.discard(job)
        dropped = job.left - job.running
        if dropped:
            self._observer.dropped(job.lane, dropped)
            self._lanes[job.lane].reserved -= dropped
            job.left = job.running

    def _refusal(self, texts: int, lane: Lane) -> errors.Problem:
        limit = self._max_queue_texts
        if texts > limit:
            return errors.BodyTooLarge(
                f"texts: at most {limit} texts fit the queue, got {texts}", field="texts", limit=limit, value=texts
            )
        waiting = sum(queue.reserved for queue in self._lanes.values())
        retry_after_s = waiting / self._texts_per_s if self._texts_per_s else 1.0
        return errors.Overloaded(
            f"texts: the {lane} queue holds {self._lanes[lane].reserved} of {limit} texts, got {texts} more",
            field="texts",
            limit=limit,
            value=texts,
            retry_after_s=min(MAX_RETRY_AFTER_S, max(1.0, retry_after_s)),
        )

    async def _serve(self) -> None:
        try:
            while True:
                batch = self._next_batch()
                if batch:
                    await self._run(batch)
                else:
                    self._arrived.clear()
                    await self._arrived.wait()
        finally:  # ended or broken: no job may wait for ever
            for job in self._jobs:
                job.fail(errors.Unavailable("the model stopped running"))

    def _next_batch(self) -> list[_Waiting[T]]:
        now = self._clock()
        interactive, bulk = (self._lanes[lane] for lane in (Lane.INTERACTIVE, Lane.BULK))
        waiting = {"interactive": bool(interactive.window(now)), "bulk": bool(bulk.window(now))}
        if not any(waiting.values()):
            return []
        lane, self._bulk_credit = choose_lane(**waiting, credit=self._bulk_credit, bulk_share=self._bulk_share)
        return self._lanes[lane].take(now, self._limits)

    async def _run(self, batch: list[_Waiting[T]]) -> None:
        started = self._clock()
        outcomes = await self._outcomes([waiting.item for waiting in batch])
        took_s = self._clock() - started
        for waiting, outcome in zip(batch, outcomes, strict=True):
            self._settle(waiting, outcome)
        self._report(batch, outcomes, started=started, took_s=took_s)

    async def _outcomes(self, items: list[T]) -> list[NDArray[np.float32] | errors.Problem]:
        """Returns a vector or a problem for each item.

        If a batch fails, its items run one by one, so that a bad one fails alone.
        """
        try:
            return list(await self._worker.run(functools.partial(self._checked, items)))
        except errors.Unavailable as ended:
            return [ended] * len(items)
        except Exception as broken:
            log.exception("a batch of %d texts broke", len(items))
            if len(items) > 1:
                return [(await self._outcomes([item]))[0] for item in items]
            return [_failure(broken)]

    def _checked(self, items: list[T]) -> NDArray[np.float32]:
        vectors = self._compute(items)
        if len(vectors) != len(items):
            raise ValueError(f"the backend returned {len(vectors)} vectors for {len(items)} texts")
        if not np.isfinite(vectors).all():
            raise ValueError(f"the backend returned NaN or infinity in a batch of {len(items)} texts")
        return vectors

    def _settle(self, waiting: _Waiting[T], outcome: NDArray[np.float32] | errors.Problem) -> None:
        job = waiting.job
        self._lanes[job.lane].reserved -= 1
        job.left -= 1
        job.running -= 1
        if isinstance(outcome, errors.Problem):
            job.fail(outcome)
        else:
            job.fill(waiting.row, outcome)

    def _report(
        self,
        batch: list[_Waiting[T]],
        outcomes: list[NDArray[np.float32] | errors.Problem],
        *,
        started: float,
        took_s: float,
    ) -> None:
        rate = len(batch) / max(took_s, 1e-6)
        self._texts_per_s += (rate - self._texts_per_s) * (_RATE_WEIGHT if self._batches else 1.0)
        self._batches += 1
        longest = max(waiting.length for waiting in batch)
        self._observer.batch_done(
            BatchReport(
                lane=batch[0].job.lane,
                texts=len(batch),
                failed=sum(isinstance(outcome, errors.Problem) for outcome in outcomes),
                tokens=sum(waiting.item.length for waiting in batch),
                padded_tokens=longest * self._limits.grid.rows(len(batch)),
                took_s=took_s,
                oldest_wait_s=started - min(waiting.since for waiting in batch),
            )
        )


def _failure(broken: Exception) -> errors.Problem:
    """Returns what the caller is told: the log has the rest, for an exception may quote a text."""
    return errors.InferenceFailed(f"the model failed on a text ({type(broken).__name__})")
