"""The way to the replicas: flights in, calls to HAProxy out, each call a piece of like work.

Each lane has its own queue and its own calls. A flight leaves at once if a call is free; while all are busy, flights
of different requests wait and leave together. There is no timer. A piece holds up to `piece_bytes` of text, since
HAProxy balances requests by number and only pieces of like work make that fair.

The gateway alone repeats sent work (HAProxy repeats only connections that failed): once, within a retry budget, so
that an outage is never multiplied. A dead replica refuses the next connection, so the repetition lands elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import aiohttp
import orjson

from embedding_service.errors import (
    DeadlineExceeded,
    InferenceFailed,
    InvalidRequest,
    Overloaded,
    Problem,
    StartOver,
    Unavailable,
)
from embedding_service.singleflight import NEVER, Flight, State
from ml_base.wire import (
    BINARY_TYPE,
    PRIORITY_HEADER,
    REQUEST_ID_HEADER,
    TIMEOUT_HEADER,
    Embedded,
    Lane,
    ModelCard,
    WireError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, Self

    from embedding_service.admission import Admission
    from embedding_service.entry import KeySpace
    from embedding_service.metrics import Metrics

log = logging.getLogger(__name__)

CONNECT_S = 1.0  # HAProxy is a host away at most
CONNECT_TRIES_S = 0.8  # a reload of HAProxy refuses connections for a moment; nothing has been sent, so repeat freely
CONNECT_PAUSE_S = 0.1
KEEP_ALIVE_S = 15.0  # shorter than HAProxy's client keep-alive, so that we are the one to close
CARD_TIMEOUT_S = 2.0
MAX_TEXTS_IN_PIECE = 256  # many tiny texts: bounded by count, since each also costs the replica a row
RETRY_BUDGET = 10.0  # repetitions that may be saved up
RETRY_PAUSE_S = 0.1
"""A killed process may close its connections some milliseconds before its listening socket (measured: up to 3 ms). A
repetition within them is accepted and lost too, since leastconn prefers a replica that has nothing in hand."""
RETRY_EARNED = 0.1  # saved up per call: in the long run at most one call in ten is a repetition
MAX_IDS_SENT = 4  # request ids on a piece that several requests share; the replica's log is their reader


@dataclass(frozen=True, slots=True)
class Miss:
    """The payload of a flight: one text to compute, and what decides its vector."""

    text: str
    space: KeySpace
    work_bytes: int
    lane: Lane  # whose room it takes; the flight's own lane may rise
    request_id: str
    epoch: int


MissFlight = Flight[Miss, object]


class Broken(Exception):
    """A sent request came to nothing, but another replica may answer it; `problem` if there is no other try."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


class Balancer:
    """HTTP to HAProxy. As a context manager it owns the connections."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),  # bounded by the lanes' calls
            auto_decompress=False,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def request(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body of one exchange. Raises `Unavailable`, or `Broken` if the request had been sent.

        Connections that fail are tried again for a moment: nothing has been sent on them.
        """
        assert self._session is not None, "used outside its context"  # noqa: S101 - for the type checker and misuse
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)  # the caller bounds the whole
        give_up_at = time.monotonic() + CONNECT_TRIES_S
        while True:
            try:
                async with self._session.request(
                    method, self._url + path, data=body, headers=headers, timeout=timeout, allow_redirects=False
                ) as reply:
                    return reply.status, reply.headers, await reply.read()
            except aiohttp.ClientConnectorError as refused:
                if time.monotonic() > give_up_at:
                    raise Unavailable(
                        f"the balancer refuses connections: {refused.os_error.strerror}", retry_after_s=1
                    ) from None
            except aiohttp.ConnectionTimeoutError:
                raise Unavailable("the balancer does not accept connections", retry_after_s=1) from None
            except (aiohttp.ClientError, OSError) as broken:
                raise Broken(Unavailable(f"the connection broke: {type(broken).__name__}", retry_after_s=1)) from None
            await asyncio.sleep(CONNECT_PAUSE_S)


@dataclass(slots=True)
class _LaneState:
    lane: Lane
    max_calls: int
    queue: deque[MissFlight] = field(default_factory=deque)
    calls: int = 0


class Upstream:
    """Computes flights on the replicas. As a context manager it owns the calls.

    Every flight handed to `send` is settled through `on_reply(flights, Embedded | Exception)`, called synchronously
    once for each piece.
    """

    def __init__(
        self,
        *,
        balancer: Balancer,
        timeout_s: float,
        piece_bytes: int,
        calls: Mapping[Lane, int],
        admission: Admission,
        metrics: Metrics,
        retry_pause_s: float = RETRY_PAUSE_S,
    ) -> None:
        self.on_reply: Callable[[Sequence[Any], Embedded | Exception], None] = _nobody
        self._balancer = balancer
        self._timeout_s = timeout_s
        self._piece_bytes = piece_bytes
        self._lanes = {lane: _LaneState(lane, calls[lane]) for lane in Lane}
        self._admission = admission
        self._metrics = metrics
        self._retry_pause_s = retry_pause_s
        self._budget = RETRY_BUDGET
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
            self._lanes[Lane(flight.lane)].queue.append(flight)
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
        """The next piece of a lane: flights in order, of one key space, up to the work of a piece, at least one."""
        piece: list[MissFlight] = []
        work = 0
        while state.queue and len(piece) < MAX_TEXTS_IN_PIECE:
            flight = state.queue[0]
            if flight.state is State.QUEUED:
                miss = flight.payload
                if piece and (miss.space is not piece[0].payload.space or work + miss.work_bytes > self._piece_bytes):
                    break
                flight.state = State.DISPATCHED
                piece.append(flight)
                work += miss.work_bytes
            state.queue.popleft()  # taken, abandoned, or promoted and gone
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
            self._metrics.upstream_duration.observe(time.monotonic() - started)
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
        give_up_at = min(now + self._timeout_s, latest)
        self._metrics.upstream_texts.inc(len(piece))
        self._budget = min(RETRY_BUDGET, self._budget + RETRY_EARNED)
        try:
            async with asyncio.timeout(max(0.0, give_up_at - now)):
                try:
                    return await self._post(lane, piece, give_up_at)
                except Broken as failed:
                    self._spend_retry(failed.problem)
                await asyncio.sleep(self._retry_pause_s)
                try:
                    return await self._post(lane, piece, give_up_at)
                except Broken as again:
                    raise again.problem from None
        except TimeoutError:
            late = DeadlineExceeded(
                f"no answer from a replica within {give_up_at - now:.3f} s", limit=round(give_up_at - now, 3)
            )
            # Cut short by a waiter's deadline: who joined since then has time left, and may ask again.
            raise (StartOver(late) if latest < NEVER and give_up_at == latest else late) from None

    def _spend_retry(self, problem: Problem) -> None:
        """Takes one repetition from the budget. Raises `problem` if there is none."""
        if self._budget < 1:
            log.warning("not repeated, the retry budget is used up: %s", problem.message)
            raise problem from None
        self._budget -= 1
        self._metrics.upstream_retries.inc()
        log.info("repeating a call on another replica: %s", problem.message)

    async def _post(self, lane: Lane, piece: list[MissFlight], give_up_at: float) -> Embedded:
        space = piece[0].payload.space
        body: dict[str, object] = {
            "texts": [flight.payload.text for flight in piece],
            "model_id": space.model_id,
            "prompt_name": space.prompt_name,
            "truncation_direction": space.direction,
        }
        headers = {
            "accept": BINARY_TYPE,
            "content-type": "application/json",
            PRIORITY_HEADER: lane.value,
            TIMEOUT_HEADER: str(max(1, int((give_up_at - time.monotonic()) * 1000))),
            REQUEST_ID_HEADER: _joined_ids(piece),
        }
        status, reply_headers, reply = await self._balancer.request("POST", "/embed", orjson.dumps(body), headers)
        if status != 200:  # noqa: PLR2004
            raise _problem_of(status, reply_headers, reply)
        try:
            return Embedded.from_bytes(reply, texts=len(piece))
        except WireError as broken:
            log.error("a replica broke the contract: %s", broken)  # noqa: TRY400 - the trace says nothing more
            raise Broken(InferenceFailed("a replica sent an unusable reply")) from None

    async def fetch_card(self) -> ModelCard:
        """The card of the replicas' default model. Raises `Problem`."""
        try:
            async with asyncio.timeout(CARD_TIMEOUT_S):
                status, headers, reply = await self._balancer.request("GET", "/models", None, {})
            if status != 200:  # noqa: PLR2004
                raise _problem_of(status, headers, reply)
            listed = orjson.loads(reply)
            cards = (model["card"] for model in listed["models"])
            return ModelCard.from_json(orjson.dumps(next(card for card in cards if card["id"] == listed["default"])))
        except Broken as failed:
            raise failed.problem from None
        except TimeoutError:
            raise Unavailable("no replica answered /models in time") from None
        except (KeyError, TypeError, ValueError, StopIteration) as broken:
            raise Unavailable(f"a replica's /models is unusable: {broken!r}") from None


def _shutting_down() -> Unavailable:
    return Unavailable("the gateway is shutting down", retry_after_s=1)


def _nobody(flights: Sequence[Any], result: Embedded | Exception) -> None:
    raise RuntimeError(f"{len(flights)} flights came back to nobody: {result!r}")


def _problem_of(status: int, headers: Mapping[str, str], reply: bytes) -> Exception:
    """What a reply other than 200 means for the flights: a problem, or one worth another replica."""
    message = f"HTTP {status}"
    detail: dict[str, Any] = {}
    with contextlib.suppress(ValueError, TypeError):
        detail = dict(orjson.loads(reply))
        message = str(detail.get("error", message))
    retry_after_s = 1.0
    with contextlib.suppress(ValueError):
        retry_after_s = float(headers.get("retry-after", "1"))
    match status:
        case 429:
            return Overloaded(f"the replicas are full: {message}", retry_after_s=retry_after_s)
        case 502 | 503:
            return Broken(Unavailable(f"no replica could answer: {message}", retry_after_s=retry_after_s))
        case 504:
            return DeadlineExceeded(f"a replica ran out of time: {message}")
        case 400 | 404 | 413 | 422:
            return InvalidRequest(
                message, field=detail.get("field"), limit=detail.get("limit"), value=detail.get("value")
            )
        case _:
            return InferenceFailed(f"a replica failed: {message}")


def _joined_ids(piece: list[MissFlight]) -> str:
    ids = list(dict.fromkeys(flight.payload.request_id for flight in piece))
    more = f",+{len(ids) - MAX_IDS_SENT}" if len(ids) > MAX_IDS_SENT else ""
    return ",".join(ids[:MAX_IDS_SENT])[:120] + more
