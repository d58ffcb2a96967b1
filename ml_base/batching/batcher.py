"""Requests in, slices out: bounded lanes of waiting texts before the thread that computes.

A slice is what runs in one go. An idle model starts at once, whatever waits; while it computes, texts gather.
Everything here runs on the event loop and changes state only between awaits, so there are no locks; only
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
from ml_base.batching.slices import SliceLimits, SliceReport, choose_lane, pick

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence, Sized

    from numpy.typing import NDArray

    from ml_base.machine.worker import Worker

T = TypeVar("T", bound="Sized")  # a tokenized text; its len() is the tokens to compute

log = logging.getLogger(__name__)

WINDOW_TEXTS = 256
"""Only the oldest texts of a lane are looked at for company: enough for many slices, and sorting them takes 0.1 ms."""

MAX_RETRY_AFTER_S = 60.0
_RATE_WEIGHT = 0.1  # of the newest slice in the moving drain rate: about the last ten count


class Observer(Protocol):
    """Where facts are counted. Each admitted text ends in a slice (computed or failed) or is dropped."""

    def slice_done(self, report: SliceReport) -> None: ...
    def refused(self, lane: Lane, texts: int) -> None: ...
    def dropped(self, lane: Lane, texts: int) -> None: ...
    def truncated(self, texts: int) -> None: ...


class Job(Generic[T]):
    """One request: holds room in its lane from admission to the end of its `with` block; rows fill as slices finish."""

    def __init__(self, batcher: Batcher[T], lane: Lane, texts: int, deadline: float) -> None:
        self.lane = lane
        self.left = texts  # texts admitted and neither settled nor dropped
        self.running = 0  # those of them in the slice that runs now
        self.deadline = deadline
        self.passed_at = math.inf  # since when younger jobs have been served before this one
        self._batcher = batcher
        self._texts = texts
        self._put = 0
        self._rows: NDArray[np.float32] | None = None  # made with the first slice, which tells the dimension
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._batcher.release(self)
        self._done.cancel()  # what still waits of this job is dropped when its turn comes

    @property
    def done(self) -> bool:
        return self._done.done()

    def put(self, items: Sequence[T]) -> None:
        """The next texts of this request, in order; they may be computed from now on."""
        self._batcher.enqueue(self, items, first_row=self._put)
        self._put += len(items)

    async def vectors(self) -> NDArray[np.float32]:
        """Row i belongs to the i-th text put. Raises what happened to the first text that failed."""
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
            self._done.exception()  # seen: a job whose caller left before awaiting it must not warn


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
    """Texts of one lane, oldest first: a window in which company is sought, and the rest behind it."""

    def __init__(self) -> None:
        self.reserved = 0  # texts admitted and not yet settled, waiting, running or still being tokenized
        self._window: list[_Waiting[T]] = []
        self._behind: deque[_Waiting[T]] = deque()

    def append(self, waiting: _Waiting[T]) -> None:
        self._behind.append(waiting)

    def window(self, now: float) -> list[_Waiting[T]]:
        """The oldest live texts. Those of a job that ended or expired are dropped here, before they are computed."""
        self._window = [waiting for waiting in self._window if _alive(waiting.job, now)]
        while self._behind and len(self._window) < WINDOW_TEXTS:
            waiting = self._behind.popleft()
            if _alive(waiting.job, now):
                self._window.append(waiting)
        return self._window

    def take(self, now: float, limits: SliceLimits) -> list[_Waiting[T]]:
        """Cuts the next slice out of the window, and notes whose texts it passed over."""
        picked = pick(self._window, now=now, limits=limits)
        slice_ = [self._window[position] for position in picked]
        for waiting in slice_:
            waiting.job.running += 1
        chosen = set(picked)
        self._note_passed_over(chosen, now)
        self._window = [waiting for position, waiting in enumerate(self._window) if position not in chosen]
        return slice_

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
    """Feeds slices to `worker`, as an async context manager; `admit` is the way in.

    Models that share a worker take turns, a slice each.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[T]], NDArray[np.float32]],
        *,
        worker: Worker,
        limits: SliceLimits,
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
        self._texts_per_s = 0.0  # moving drain rate; 0 until the first slice
        self._slices = 0
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        counts = " ".join(f"{lane}={queue.reserved}" for lane, queue in self._lanes.items())
        return f"<Batcher {counts} running={self._worker.running_since is not None} slices={self._slices}>"

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._serve(), name="batcher")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    @property
    def alive(self) -> bool:
        """False once nothing will be computed any more: not started, ended, or broken."""
        return self._task is not None and not self._task.done()

    def reserved(self, lane: Lane) -> int:
        """Texts admitted to a lane and not yet settled."""
        return self._lanes[lane].reserved

    def admit(self, texts: int, *, lane: Lane, deadline: float = math.inf) -> Job[T]:
        """Room for that many texts, until `deadline` on the batcher's clock. Raises `Overloaded` or `BodyTooLarge`."""
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
            length = self._limits.grid.length(len(item))
            self._lanes[job.lane].append(_Waiting(job, row, item, length, now))
        self._arrived.set()

    def release(self, job: Job[T]) -> None:
        """Gives back the room of what still waits; called at the end of every job, whatever happened.

        What runs keeps its room until its slice is done: it is being computed, though for nobody.
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
                slice_ = self._next_slice()
                if slice_:
                    await self._run(slice_)
                else:
                    self._arrived.clear()
                    await self._arrived.wait()
        finally:  # ended or broken: nobody may wait for ever
            for job in self._jobs:
                job.fail(errors.Unavailable("the model stopped running"))

    def _next_slice(self) -> list[_Waiting[T]]:
        now = self._clock()
        interactive, bulk = (self._lanes[lane] for lane in (Lane.INTERACTIVE, Lane.BULK))
        waiting = {"interactive": bool(interactive.window(now)), "bulk": bool(bulk.window(now))}
        if not any(waiting.values()):
            return []
        lane, self._bulk_credit = choose_lane(**waiting, credit=self._bulk_credit, bulk_share=self._bulk_share)
        return self._lanes[lane].take(now, self._limits)

    async def _run(self, slice_: list[_Waiting[T]]) -> None:
        started = self._clock()
        outcomes = await self._outcomes([waiting.item for waiting in slice_])
        took_s = self._clock() - started
        for waiting, outcome in zip(slice_, outcomes, strict=True):
            self._settle(waiting, outcome)
        self._report(slice_, outcomes, started=started, took_s=took_s)

    async def _outcomes(self, items: list[T]) -> list[NDArray[np.float32] | errors.Problem]:
        """One vector or problem for each item. If a slice breaks, its items run one by one, so that one fails alone."""
        try:
            return list(await self._worker.run(functools.partial(self._checked, items)))
        except errors.Unavailable as ended:
            return [ended] * len(items)
        except Exception as broken:
            log.exception("a slice of %d texts broke", len(items))
            if len(items) > 1:
                return [(await self._outcomes([item]))[0] for item in items]
            return [_failure(broken)]

    def _checked(self, items: list[T]) -> NDArray[np.float32]:
        vectors = self._compute(items)
        if len(vectors) != len(items):
            raise ValueError(f"the backend returned {len(vectors)} vectors for {len(items)} texts")
        if not np.isfinite(vectors).all():
            raise ValueError(f"the backend returned NaN or infinity in a slice of {len(items)} texts")
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
        slice_: list[_Waiting[T]],
        outcomes: list[NDArray[np.float32] | errors.Problem],
        *,
        started: float,
        took_s: float,
    ) -> None:
        rate = len(slice_) / max(took_s, 1e-6)
        self._texts_per_s += (rate - self._texts_per_s) * (_RATE_WEIGHT if self._slices else 1.0)
        self._slices += 1
        longest = max(waiting.length for waiting in slice_)
        self._observer.slice_done(
            SliceReport(
                lane=slice_[0].job.lane,
                texts=len(slice_),
                failed=sum(isinstance(outcome, errors.Problem) for outcome in outcomes),
                tokens=sum(len(waiting.item) for waiting in slice_),
                padded_tokens=longest * self._limits.grid.rows(len(slice_)),
                took_s=took_s,
                oldest_wait_s=started - min(waiting.since for waiting in slice_),
            )
        )


def _failure(broken: Exception) -> errors.Problem:
    """What the caller is told: the log has the rest, for an exception may quote a text."""
    return errors.InferenceFailed(f"the model failed on a text ({type(broken).__name__})")
