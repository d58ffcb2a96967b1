"""The lanes to the replicas: a lane is the room that it grants, its queue, and its calls under way.

Each lane has its own queue and its own calls. A flight leaves at once if a call is free; while all calls are busy,
flights of different requests wait and leave together. There is no timer. A chunk, the work of one call, holds up to
`chunk_bytes` of text, since HAProxy balances requests by number, and only chunks of like work make that fair.

Room is reserved before work is claimed, so nothing is taken and then refused. Cached texts and texts that join a
computation cost nothing. A flight, not a request, owns its reservation.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from embedding_common.contract import TIMEOUT_HEADER, Lane
from embedding_service.core.query import Miss
from embedding_service.core.singleflight import NEVER, Flight, State
from embedding_service.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    InferenceFailed,
    Overloaded,
    Problem,
    StartOver,
    Unavailable,
)
from embedding_service.upstream.calls import Broken, EmbedCall

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, Self

    from embedding_common.contract import Embedded
    from embedding_service.cache.entry import KeySpace
    from embedding_service.observability.metrics import Metrics
    from embedding_service.upstream.calls import Replicas
    from embedding_service.upstream.retry import Retry

log = logging.getLogger(__name__)

MAX_TEXTS_IN_CHUNK = 256  # many tiny texts: bounded by count, since each also costs the replica a row
JSON_BYTES_PER_CHAR = 6  # at most: a control character, as \u001f
TIDY_CHARS = 1 << 20  # of text that a lane takes in before it looks for what its callers have left behind
USUAL_SHARE = 0.2  # share of the newest call in the usual duration: follows a change within some five calls
MAX_IDS_SENT = 4  # request ids on a chunk that several requests share; the replica's log is their reader

RETRY_AFTER_BOUNDS_S = (1.0, 30.0)
RATE_WINDOW_S = 0.5  # of the measured drain rate: long enough to hold several calls
RATE_IDLE_S = 10.0  # a longer gap between replies was idleness: a call takes less

MissFlight: TypeAlias = Flight[Miss, "Any"]


class Admission:
    """The bytes of text that each lane has admitted and not yet settled."""

    def __init__(self, *, max_pending_bytes: Mapping[Lane, int], clock: Callable[[], float] = time.monotonic) -> None:
        self._max_pending_bytes = max_pending_bytes
        self._pending_bytes = dict.fromkeys(max_pending_bytes, 0)
        self._clock = clock
        self._bytes_per_s = 0.0
        self._window_began = clock()
        self._window_bytes = 0

    def __repr__(self) -> str:
        return f"<Admission {self._pending_bytes} of {self._max_pending_bytes}>"

    def pending_bytes(self, lane: Lane) -> int:
        return self._pending_bytes[lane]

    def reserve(self, lane: Lane, work_bytes: int) -> None:
        """Makes room for that much text. Raises `Overloaded`, or `BodyTooLarge` if it can never fit."""
        most, pending = self._max_pending_bytes[lane], self._pending_bytes[lane]
        if work_bytes > most:
            raise BodyTooLarge(
                f"texts: the {lane} lane holds at most {most} bytes of uncached text, got {work_bytes}",
                field="texts",
                limit=most,
                value=work_bytes,
            )
        if pending + work_bytes > most:
            raise Overloaded(
                f"texts: the {lane} lane is full: {pending} of {most} bytes are waiting, {work_bytes} more do not fit",
                field="texts",
                limit=most,
                value=work_bytes,
                retry_after_s=self._seconds_for(pending + work_bytes - most),
            )
        self._pending_bytes[lane] = pending + work_bytes

    def release(self, lane: Lane, work_bytes: int) -> None:
        """Gives reserved room back."""
        self._pending_bytes[lane] -= work_bytes

    def release_flight(self, flight: MissFlight) -> None:
        """Gives back the room of a flight that has settled."""
        self.release(flight.payload.lane, flight.payload.work_bytes)

    def drained(self, work_bytes: int) -> None:
        """Notes that so much text has just been computed: the drain rate is measured from this."""
        now = self._clock()
        elapsed_s = now - self._window_began
        if elapsed_s > RATE_IDLE_S:  # nothing to do is not slowness
            self._window_began, self._window_bytes = now, 0
            return
        self._window_bytes += work_bytes
        if elapsed_s >= RATE_WINDOW_S:
            rate = self._window_bytes / elapsed_s
            self._bytes_per_s = rate if self._bytes_per_s == 0 else 0.7 * self._bytes_per_s + 0.3 * rate
            self._window_began, self._window_bytes = now, 0

    def _seconds_for(self, work_bytes: int) -> float:
        least, most = RETRY_AFTER_BOUNDS_S
        return least if self._bytes_per_s == 0 else min(most, max(least, work_bytes / self._bytes_per_s))


@dataclass(slots=True)
class _LaneState:
    lane: Lane
    max_calls: int
    queue: deque[MissFlight] = field(default_factory=deque)
    calls: int = 0
    usual_s: float = 0.0  # the duration of a call, as measured lately
    chars: int = 0  # characters queued since the queue was last tidied,
    tidy_at: int = TIDY_CHARS  # and how many of them lead to the next tidying

    def append(self, flight: MissFlight) -> None:
        """Queues a flight. Abandoned flights are dropped as soon as they may be half of the text that is held.

        An abandoned flight gave its room in the lane back when its callers left. While calls hang nothing is taken
        from the queue, and callers that give up and come again would fill the memory.
        """
        self.queue.append(flight)
        self.chars += len(flight.payload.text) + 1
        if self.chars > self.tidy_at:
            self.queue = deque([queued for queued in self.queue if queued.state is State.QUEUED])
            self.tidy_at = TIDY_CHARS + sum(len(queued.payload.text) + 1 for queued in self.queue)
            self.chars = 0

    def took(self, duration_s: float) -> None:
        self.usual_s += USUAL_SHARE * (duration_s - self.usual_s)

    def is_too_late(self, flight: MissFlight, now: float) -> bool:
        """Whether the flight would be computed in vain, in the place of others that have the time.

        Only while at most one call is free: an idle lane tries, since what it knows of calls may be old.
        """
        full = 0 < self.calls >= self.max_calls - 1
        return full and flight.deadline - now < self.usual_s


class Lanes:
    """Sends flights to the replicas, a chunk a call. As a context manager it owns the calls.

    Every flight handed to `send` is settled through `settle(flights, Embedded | Exception)`, called synchronously once
    for each chunk.
    """

    def __init__(
        self,
        *,
        replicas: Replicas,
        retry: Retry,
        settle: Callable[[Sequence[MissFlight], Embedded | Exception], None],
        chunk_bytes: int,
        max_texts: int,
        max_body_bytes: int,
        calls: Mapping[Lane, int],
        call_timeout_s: float,
        admission: Admission,
        metrics: Metrics,
    ) -> None:
        self._replicas = replicas
        self._retry = retry
        self._settle = settle
        self._chunk_bytes = chunk_bytes
        # Replicas are told the limits of one request too, and would refuse texts of several that left together. What a
        # text adds to the body is not its `work_bytes`, which end where the model stops reading.
        self._chunk_texts = min(max_texts, MAX_TEXTS_IN_CHUNK)
        self._chunk_chars = max_body_bytes // JSON_BYTES_PER_CHAR
        self._lanes = {lane: _LaneState(lane, calls[lane]) for lane in Lane}
        self._call_timeout_s = call_timeout_s
        self._admission = admission
        self._metrics = metrics
        self._tasks: dict[asyncio.Task[None], list[MissFlight]] = {}
        self._closed = False

    def __repr__(self) -> str:
        lanes = ", ".join(f"{s.lane}: {s.calls} calls, {len(s.queue)} queued" for s in self._lanes.values())
        return f"<Lanes {lanes}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closed = True
        under_way = dict(self._tasks)
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        waiting = [flight for state in self._lanes.values() for flight in state.queue]
        # a task cancelled before its first step never ran its finally; settling twice does nothing
        for flights in (*under_way.values(), waiting):
            self._settle(flights, _shutting_down())

    # --- queueing: synchronous ---

    def send(self, flights: Sequence[MissFlight]) -> None:
        """Takes flights over: they leave now if a call is free, else with the next one."""
        for flight in flights:
            flight.state = State.QUEUED
            self._lanes[Lane(flight.lane)].append(flight)
        for lane in {flight.lane for flight in flights}:
            self._start_calls(self._lanes[Lane(lane)])

    def promote(self, flight: MissFlight) -> None:
        """A person now waits for what a job asked for: if it has not left yet, it leaves with the interactive lane.

        It stays in the bulk queue as well, where it is passed over once it has been dispatched from here.
        """
        if flight.lane == Lane.BULK:
            flight.lane = Lane.INTERACTIVE
            if flight.state is State.QUEUED:  # else it is being looked up in L2, and will be sent to the right lane
                self.send([flight])

    def _start_calls(self, state: _LaneState) -> None:
        while not self._closed and state.calls < state.max_calls and (chunk := self._cut(state)):
            state.calls += 1
            task = asyncio.create_task(self._call(state, chunk))
            self._tasks[task] = chunk
            task.add_done_callback(self._tasks.pop)

    def _cut(self, state: _LaneState) -> list[MissFlight]:
        """The next chunk of a lane: flights in order, of one key space, up to the work of a chunk, at least one flight.

        Flights whose time is over before they could be back fail instead.
        """
        chunk: list[MissFlight] = []
        late: list[MissFlight] = []
        work = chars = 0
        now = time.monotonic()
        while state.queue and len(chunk) < self._chunk_texts:
            flight = state.queue[0]
            if flight.state is State.QUEUED and state.is_too_late(flight, now):
                if flight.lane == state.lane:  # else it has been promoted, and the other lane's calls are faster
                    late.append(flight)
            elif flight.state is State.QUEUED:
                miss = flight.payload
                work += miss.work_bytes
                chars += len(miss.text)
                too_much = work > self._chunk_bytes or chars > self._chunk_chars
                if chunk and (too_much or miss.space is not chunk[0].payload.space):
                    break
                flight.state = State.DISPATCHED
                chunk.append(flight)
            state.queue.popleft()  # taken, abandoned, too late, or promoted and gone
        if late:
            problem = f"{TIMEOUT_HEADER}: less time is left than the {state.usual_s:.3f} s that a call takes now"
            self._settle(late, DeadlineExceeded(problem, field=TIMEOUT_HEADER))
        return chunk

    # --- calling ---

    async def _call(self, state: _LaneState, chunk: list[MissFlight]) -> None:
        started = time.monotonic()
        result: Embedded | Exception | None = None  # none if it is cancelled
        try:
            result = await self._embed(state.lane, chunk)
            self._metrics.upstream_calls["ok"].inc()
            self._admission.drained(sum([flight.payload.work_bytes for flight in chunk]))
        except (Problem, StartOver) as problem:
            result = problem
            self._metrics.upstream_calls[_result_label(problem)].inc()
        except Exception:
            log.exception("a call upstream failed")
            result = InferenceFailed("internal error; the log has the detail")
        finally:
            state.calls -= 1
            took_s = time.monotonic() - started
            state.took(took_s)
            self._metrics.upstream_duration.observe(took_s)
            self._settle(chunk, result if result is not None else _shutting_down())
            self._start_calls(state)

    async def _embed(self, lane: Lane, chunk: list[MissFlight]) -> Embedded:
        """Vectors of one chunk, within its time. Raises `Problem` or `StartOver`."""
        now = time.monotonic()
        latest = max([flight.deadline for flight in chunk])
        give_up_at = min(now + self._call_timeout_s, latest)
        self._metrics.upstream_texts.inc(len(chunk))
        call = EmbedCall(
            chunk[0].payload.space,
            [flight.payload.text for flight in chunk],
            lane=lane,
            request_id=_joined_ids(chunk),
            give_up_at=give_up_at,
        )
        try:
            async with asyncio.timeout(max(0.0, give_up_at - now)):
                try:
                    return await self._replicas.embed(call)
                except Broken as failed:
                    return await self._retry.repeat(call, failed, self._replicas.send)
        except TimeoutError:
            late = DeadlineExceeded(
                f"no answer from a replica within {give_up_at - now:.3f} s", limit=round(give_up_at - now, 3)
            )
            # Cut short by a waiter's deadline: requests that joined since then have time left, and may ask again.
            raise (StartOver(late) if latest < NEVER and give_up_at == latest else late) from None

    async def compute_aside(self, space: KeySpace, text: str) -> Embedded:
        """The vector of one text that no caller waits for: a job, which is refused while other jobs wait.

        Raises `Problem`.
        """
        if self._lanes[Lane.BULK].queue:
            raise Overloaded("the bulk lane has work waiting")
        return await self._replicas.embed_aside(space, text)


def _shutting_down() -> Unavailable:
    return Unavailable("the gateway is shutting down", retry_after_s=1)


def _result_label(problem: Exception) -> str:
    match problem:
        case StartOver() | DeadlineExceeded():
            return "timeout"
        case Overloaded() | Unavailable():
            return "refused"
        case _:
            return "failed"


def _joined_ids(chunk: list[MissFlight]) -> str:
    ids = list(dict.fromkeys([flight.payload.request_id for flight in chunk]))
    more = f",+{len(ids) - MAX_IDS_SENT}" if len(ids) > MAX_IDS_SENT else ""
    return ",".join(ids[:MAX_IDS_SENT])[:120] + more
