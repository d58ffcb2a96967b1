"""The way to the replicas: flights in, calls to HAProxy out, each call a piece of like work.

Each lane has its own queue and its own calls. A flight leaves at once if a call is free; while all are busy, flights
of different requests wait and leave together. There is no timer. A piece holds up to `piece_bytes` of text, since
HAProxy balances requests by number and only pieces of like work make that fair.

The gateway alone repeats sent work (HAProxy repeats only connections that failed): once, within a retry budget, so
that an outage is never multiplied. A dead replica refuses the next connection, so the repetition lands elsewhere. One
that has answered what cannot be used is avoided by name.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from embedding_common.contract import TIMEOUT_HEADER, Lane
from embedding_service.core.query import Miss
from embedding_service.core.singleflight import NEVER, Flight, State
from embedding_service.errors import DeadlineExceeded, InferenceFailed, Overloaded, Problem, StartOver, Unavailable
from embedding_service.observability.log_throttle import Seldom
from embedding_service.upstream.http import Broken

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, Self

    from embedding_common.contract import Embedded
    from embedding_service.cache.entry import KeySpace
    from embedding_service.core.admission import Admission
    from embedding_service.observability.metrics import Metrics
    from embedding_service.upstream.calls import Replicas

log = logging.getLogger(__name__)

MAX_TEXTS_IN_PIECE = 256  # many tiny texts: bounded by count, since each also costs the replica a row
JSON_BYTES_PER_CHAR = 6  # at most: a control character, as \u001f
RETRY_BUDGET = 10.0  # repetitions that may be saved up
RETRY_PAUSE_S = 0.1
"""A killed process may close its connections some milliseconds before its listening socket (measured: up to 3 ms). A
repetition within them is accepted and lost too, since leastconn prefers a replica that has nothing in hand."""
RETRY_EARNED = 0.1  # saved up per call: in the long run at most one call in ten is a repetition
TIDY_CHARS = 1 << 20  # of text that a lane takes in before it looks for what its callers have left behind
USUAL_SHARE = 0.2  # of the newest call in what a call usually takes: follows a change within some five calls
MAX_IDS_SENT = 4  # request ids on a piece that several requests share; the replica's log is their reader


MissFlight = Flight[Miss, object]


@dataclass(slots=True)
class _LaneState:
    lane: Lane
    max_calls: int
    queue: deque[MissFlight] = field(default_factory=deque)
    calls: int = 0
    usual_s: float = 0.0  # what a call has taken lately
    chars: int = 0  # queued since the queue was last tidied, and
    tidy_at: int = TIDY_CHARS  # how many of them shall have it tidied again

    def take(self, flight: MissFlight) -> None:
        """Queues it. What has been abandoned goes, if it may be half of the texts that are held.

        It gave its room in the lane back when its callers left. While calls hang nothing is taken from the queue, and
        callers who give up and come again would fill the memory.
        """
        self.queue.append(flight)
        self.chars += len(flight.payload.text) + 1
        if self.chars > self.tidy_at:
            self.queue = deque(queued for queued in self.queue if queued.state is State.QUEUED)
            self.tidy_at = TIDY_CHARS + sum(len(queued.payload.text) + 1 for queued in self.queue)
            self.chars = 0

    def took(self, duration_s: float) -> None:
        self.usual_s += USUAL_SHARE * (duration_s - self.usual_s)

    def too_late(self, flight: MissFlight, now: float) -> bool:
        """Whether it would be computed for nobody, in the place of others who have the time.

        Only while no more than one call is free: an idle lane tries, since what it knows of calls may be old.
        """
        full = 0 < self.calls >= self.max_calls - 1
        return full and flight.deadline - now < self.usual_s


class Upstream:
    """Computes flights on the replicas. As a context manager it owns the calls.

    Every flight handed to `send` is settled through `on_reply(flights, Embedded | Exception)`, called synchronously
    once for each piece.
    """

    def __init__(
        self,
        *,
        replicas: Replicas,
        piece_bytes: int,
        max_texts: int,
        max_body_bytes: int,
        calls: Mapping[Lane, int],
        admission: Admission,
        metrics: Metrics,
        retry_pause_s: float = RETRY_PAUSE_S,
    ) -> None:
        self.on_reply: Callable[[Sequence[Any], Embedded | Exception], None] = _nobody
        self._replicas = replicas
        self._piece_bytes = piece_bytes
        # Replicas are told the limits of one request too, and would refuse texts of several that left together. What a
        # text adds to the body is not its `work_bytes`, which end where the model stops reading.
        self._piece_texts = min(max_texts, MAX_TEXTS_IN_PIECE)
        self._piece_chars = max_body_bytes // JSON_BYTES_PER_CHAR
        self._lanes = {lane: _LaneState(lane, calls[lane]) for lane in Lane}
        self._admission = admission
        self._metrics = metrics
        self._retry_pause_s = retry_pause_s
        self._budget = RETRY_BUDGET
        self._tell_spent = Seldom(log.warning)
        self._tell_repeated = Seldom(log.info)
        self._tasks: dict[asyncio.Task[None], list[MissFlight]] = {}
        self._closed = False

    def __repr__(self) -> str:
        lanes = ", ".join(f"{s.lane}: {s.calls} calls, {len(s.queue)} queued" for s in self._lanes.values())
        return f"<Upstream {lanes}>"

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
            self.on_reply(flights, _shutting_down())

    # --- queueing: synchronous ---

    def send(self, flights: Sequence[Flight[Miss, Any]]) -> None:
        """Takes flights over: they leave now if a call is free, else with the next one."""
        for flight in flights:
            flight.state = State.QUEUED
            self._lanes[Lane(flight.lane)].take(flight)
        for lane in {flight.lane for flight in flights}:
            self._start_calls(self._lanes[Lane(lane)])

    def promote(self, flight: Flight[Miss, Any]) -> None:
        """A person now waits for what a job asked for: if it has not left yet, it leaves with the interactive lane.

        It stays in the bulk queue as well, where it is passed over once it has been dispatched from here.
        """
        if flight.lane == Lane.BULK:
            flight.lane = Lane.INTERACTIVE
            if flight.state is State.QUEUED:  # else it is being looked up in L2, and will be sent to the right lane
                self.send([flight])

    def _start_calls(self, state: _LaneState) -> None:
        while not self._closed and state.calls < state.max_calls and (piece := self._cut(state)):
            state.calls += 1
            task = asyncio.create_task(self._call(state, piece))
            self._tasks[task] = piece
            task.add_done_callback(self._tasks.pop)

    def _cut(self, state: _LaneState) -> list[MissFlight]:
        """The next piece of a lane: flights in order, of one key space, up to the work of a piece, at least one.

        Flights whose time is over before they could be back fail instead.
        """
        piece: list[MissFlight] = []
        late: list[MissFlight] = []
        work = chars = 0
        now = time.monotonic()
        while state.queue and len(piece) < self._piece_texts:
            flight = state.queue[0]
            if flight.state is State.QUEUED and state.too_late(flight, now):
                if flight.lane == state.lane:  # else it has been promoted, and the other lane's calls are faster
                    late.append(flight)
            elif flight.state is State.QUEUED:
                miss = flight.payload
                work += miss.work_bytes
                chars += len(miss.text)
                too_much = work > self._piece_bytes or chars > self._piece_chars
                if piece and (too_much or miss.space is not piece[0].payload.space):
                    break
                flight.state = State.DISPATCHED
                piece.append(flight)
            state.queue.popleft()  # taken, abandoned, too late, or promoted and gone
        if late:
            problem = f"{TIMEOUT_HEADER}: less time is left than the {state.usual_s:.3f} s that a call takes now"
            self.on_reply(late, DeadlineExceeded(problem, field=TIMEOUT_HEADER))
        return piece

    # --- calling ---

    async def _call(self, state: _LaneState, piece: list[MissFlight]) -> None:
        started = time.monotonic()
        result: Embedded | Exception = _shutting_down()  # if it is cancelled
        try:
            result = await self._embed(state.lane, piece)
            self._metrics.upstream_calls["ok"].inc()
            self._admission.drained(sum(flight.payload.work_bytes for flight in piece))
        except (Problem, StartOver) as problem:
            result = problem
            self._count_failure(problem)
        except Exception:
            log.exception("a call upstream failed")
            result = InferenceFailed("internal error; the log has the detail")
        finally:
            state.calls -= 1
            took_s = time.monotonic() - started
            state.took(took_s)
            self._metrics.upstream_duration.observe(took_s)
            self.on_reply(piece, result)
            self._start_calls(state)

    def _count_failure(self, problem: Exception) -> None:
        match problem:
            case StartOver() | DeadlineExceeded():
                result = "timeout"
            case Overloaded() | Unavailable():
                result = "refused"
            case _:
                result = "failed"
        self._metrics.upstream_calls[result].inc()

    async def _embed(self, lane: Lane, piece: list[MissFlight]) -> Embedded:
        """One piece, repeated at most once on another replica. Raises `Problem` or `StartOver`."""
        now = time.monotonic()
        latest = max(flight.deadline for flight in piece)
        give_up_at = min(now + self._replicas.timeout_s, latest)
        self._metrics.upstream_texts.inc(len(piece))
        self._budget = min(RETRY_BUDGET, self._budget + RETRY_EARNED)
        try:
            async with asyncio.timeout(max(0.0, give_up_at - now)):
                try:
                    return await self._post(lane, piece, give_up_at, may_try=self._budget >= 1)
                except Broken as failed:
                    self._spend_retry(failed.problem)
                    first = failed
                if first.replica is None:
                    await asyncio.sleep(self._retry_pause_s)
                try:
                    embedded = await self._post(lane, piece, give_up_at, avoid=first.replica)
                except Broken as again:
                    raise again.problem from None
                if first.replica is not None and first.in_doubt:
                    self._replicas.blame(first.replica)
                return embedded
        except TimeoutError:
            late = DeadlineExceeded(
                f"no answer from a replica within {give_up_at - now:.3f} s", limit=round(give_up_at - now, 3)
            )
            # Cut short by a waiter's deadline: who joined since then has time left, and may ask again.
            raise (StartOver(late) if latest < NEVER and give_up_at == latest else late) from None

    def _spend_retry(self, problem: Problem) -> None:
        """Takes one repetition from the budget. Raises `problem` if there is none."""
        if self._budget < 1:
            self._tell_spent("not repeated, the retry budget is used up: %s", problem.message)
            raise problem from None
        self._budget -= 1
        self._metrics.upstream_retries.inc()
        self._tell_repeated("repeating a call on another replica: %s", problem.message)

    async def _post(
        self,
        lane: Lane,
        piece: list[MissFlight],
        give_up_at: float,
        *,
        avoid: str | None = None,
        may_try: bool = False,
    ) -> Embedded:
        return await self._replicas.embed(
            piece[0].payload.space,
            [flight.payload.text for flight in piece],
            lane=lane,
            request_id=_joined_ids(piece),
            within_s=give_up_at - time.monotonic(),
            avoid=avoid,
            may_try=may_try,
        )

    async def compute_aside(self, space: KeySpace, text: str) -> Embedded:
        """One text that nobody waits for: a job, which goes to no replica while other jobs wait. Raises `Problem`."""
        if self._lanes[Lane.BULK].queue:
            raise Overloaded("the bulk lane has work waiting")
        return await self._replicas.embed_aside(space, text)


def _shutting_down() -> Unavailable:
    return Unavailable("the gateway is shutting down", retry_after_s=1)


def _nobody(flights: Sequence[Any], result: Embedded | Exception) -> None:
    raise RuntimeError(f"{len(flights)} flights came back to nobody: {result!r}")


def _joined_ids(piece: list[MissFlight]) -> str:
    ids = list(dict.fromkeys(flight.payload.request_id for flight in piece))
    more = f",+{len(ids) - MAX_IDS_SENT}" if len(ids) > MAX_IDS_SENT else ""
    return ",".join(ids[:MAX_IDS_SENT])[:120] + more
