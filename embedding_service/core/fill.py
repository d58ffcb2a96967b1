"""The way of a claimed text: L2 -> upstream -> L1 and L2. The service's work, not the request's that claimed it.

Each piece settles its own flights: what L2 has, right after it answered; what was computed, when its piece is back.
Putting a value into L1 and resolving its flight are one synchronous step, so a text is at every moment in L1, in the
air, or nobody's.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from embedding_service.cache.entry import Entry
from embedding_service.core.query import Miss
from embedding_service.core.singleflight import Flight, State
from embedding_service.errors import InferenceFailed, InvalidRequest, StartOver, Unavailable
from embedding_service.observability.metrics import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self

    from embedding_common.contract import Embedded
    from embedding_service.cache.lru import LRU
    from embedding_service.core.catalog import Catalog
    from embedding_service.core.singleflight import Flights
    from embedding_service.observability.metrics import Metrics

L2_CHUNK = 256  # keys in one MGET: 400 kB at 384 dimensions, about 2 ms of Redis' one thread


@dataclass(frozen=True, slots=True)
class Landed:
    """A value in hand, and where it came from for the one who claimed it."""

    entry: Entry
    outcome: Outcome


TextFlight: TypeAlias = Flight[Miss, Landed]


class Store(Protocol):
    """L2. Never raises; what it cannot find in its own short time is not there."""

    connected: bool
    on_epoch: Callable[[int], None]

    async def get_many(self, epoch: int, keys: Sequence[bytes]) -> dict[bytes, Entry]: ...
    def put_soon(self, epoch: int, entries: Sequence[tuple[bytes, Entry]]) -> None: ...
    def raise_epoch(self, epoch: int) -> None: ...
    async def clear(self, epoch: int) -> int | None: ...


class Upstream(Protocol):
    """Whoever computes. Every flight sent is settled by one call of `on_reply` for its piece."""

    on_reply: Callable[[Sequence[TextFlight], Embedded | Exception], None]

    def send(self, flights: Sequence[TextFlight]) -> None: ...
    def promote(self, flight: TextFlight) -> None: ...


class Fill:
    """Settles flights from L2 or the replicas, and keeps what it found. As a context manager it owns its tasks."""

    def __init__(
        self,
        *,
        l1: LRU[Entry],
        l1_ttl_s: float,
        flights: Flights[Miss, Landed],
        store: Store,
        upstream: Upstream,
        catalog: Catalog,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.epoch = 0
        self._l1 = l1
        self._l1_ttl_s = l1_ttl_s
        self._flights = flights
        self._store = store
        self._upstream = upstream
        self._catalog = catalog
        self._metrics = metrics
        self._clock = clock
        self._tasks: dict[asyncio.Task[None], list[TextFlight]] = {}
        store.on_epoch = self.raise_epoch
        upstream.on_reply = self._land

    def __repr__(self) -> str:
        return f"<Fill {len(self._tasks)} reading L2>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        under_way = dict(self._tasks)
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
        for flights in under_way.values():  # a task cancelled before its first step never ran its finally
            self._fail_unsent(flights)

    async def clear(self) -> int | None:
        """Forgets everything cached, here and in L2; how many entries that held (None: it is away, and will follow)."""
        epoch = max(self.epoch + 1, time.time_ns())
        self.raise_epoch(epoch)
        return await self._store.clear(epoch)

    def raise_epoch(self, epoch: int) -> None:
        """Empties L1 if `epoch` is news. A fill that was claimed before it will store nothing."""
        if epoch > self.epoch:
            self.epoch = epoch
            self._metrics.board.raise_epoch(epoch)  # our siblings look there before each look-up
            self._store.raise_epoch(epoch)
            self._l1.clear()

    def catch_up(self) -> None:
        """Notices that a sibling process has been told to clear; says so again if our own word was lost."""
        epoch = self._metrics.board.epoch
        if epoch > self.epoch:
            self.raise_epoch(epoch)
        elif epoch < self.epoch:
            self._metrics.board.raise_epoch(self.epoch)

    def start(self, flights: list[TextFlight], *, read: bool) -> None:
        if not (read and self._store.connected):
            self._upstream.send(flights)
            return
        task = asyncio.create_task(self._read_then_send(flights))
        self._tasks[task] = flights
        task.add_done_callback(self._tasks.pop)

    async def _read_then_send(self, flights: list[TextFlight]) -> None:
        try:
            for start in range(0, len(flights), L2_CHUNK):
                chunk = flights[start : start + L2_CHUNK]
                epoch = chunk[0].payload.epoch
                found = await self._store.get_many(epoch, [flight.key for flight in chunk])
                self._settle_found(chunk, found if epoch == self.epoch else {})
        finally:
            self._fail_unsent(flights)

    def _fail_unsent(self, flights: list[TextFlight]) -> None:
        for flight in flights:
            if flight.state is State.CLAIMED:
                self._flights.fail(flight, Unavailable("the gateway is shutting down", retry_after_s=1))

    def _settle_found(self, chunk: Sequence[TextFlight], found: dict[bytes, Entry]) -> None:
        self._metrics.l2_lookups["hit"].inc(len(found))
        self._metrics.l2_lookups["miss"].inc(len(chunk) - len(found))
        fresh_until = self._clock() + self._l1_ttl_s
        for flight in chunk:
            if (entry := found.get(flight.key)) is not None:
                if flight.ttl_s > 0:
                    asked = flight.payload
                    self._l1.put(asked.space.name(asked.text), entry, expires_at=min(fresh_until, entry.expires_at))
                self._flights.resolve(flight, Landed(entry, Outcome.L2))
        self._upstream.send([flight for flight in chunk if flight.state is State.CLAIMED])

    def _land(self, flights: Sequence[TextFlight], result: Embedded | Exception) -> None:
        """One piece has come back, or failed: its own flights settle, in one step."""
        failure = result if isinstance(result, Exception) else InferenceFailed("internal error; the log has the detail")
        try:
            if not isinstance(result, Exception):
                self._store_and_resolve(flights, result)
        except StartOver as changed:
            failure = changed
        finally:
            for flight in flights:  # those resolved above stay so
                self._flights.fail(flight, failure)

    def _store_and_resolve(self, flights: Sequence[TextFlight], result: Embedded) -> None:
        """Raises `StartOver` if the vectors are another model's: they are kept, but under that model's own name."""
        self._catalog.adopt(result.card)
        asked = flights[0].payload.space
        changed = StartOver(Unavailable("the replicas have just changed to another model", retry_after_s=1))
        try:
            prompt = result.card.prompt(asked.prompt_name)
            expected = asked.covers(fingerprint=result.card.fingerprint, prompt=prompt)
            space = asked if expected else self._catalog.space(result.card, asked.prompt_name, asked.direction)
        except InvalidRequest:  # the new model lacks this prompt: nothing to keep
            raise changed from None
        now = self._clock()
        fresh_until = now + self._l1_ttl_s
        writes = []
        rows = zip(flights, result.vectors, result.tokens.tolist(), result.truncated.tolist(), strict=True)
        for flight, vector, tokens, truncated in rows:
            entry = Entry(vector.tobytes(), tokens, truncated, now + flight.ttl_s)
            if flight.ttl_s > 0 and flight.payload.epoch == self.epoch:
                text = flight.payload.text
                self._l1.put(space.name(text), entry, expires_at=min(fresh_until, entry.expires_at))
                writes.append((flight.key if expected else space.key(text), entry))
            if expected:
                self._flights.resolve(flight, Landed(entry, Outcome.UPSTREAM))
        self._store.put_soon(self.epoch, writes)
        if not expected:
            raise changed
