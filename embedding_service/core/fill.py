"""How a claimed text gets its vector: first from L2, then from a replica; then into L1 and L2.

`Fill` asks, `Landing` settles. Each chunk settles its own flights: what L2 has, right after it answered; what was
computed, when its chunk comes back. Putting a value into L1 and resolving its flight are one synchronous step, so at
every moment a text is in L1, or in flight, or neither, and never lost in between.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Protocol, TypeAlias

from embedding_service.cache.entry import Entry
from embedding_service.core.query import Miss, Outcome, Resolved
from embedding_service.core.singleflight import Flight, State
from embedding_service.errors import InferenceFailed, InvalidRequest, StartOver, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self

    from embedding_common.contract import Embedded
    from embedding_service.cache.entry import KeySpace
    from embedding_service.cache.epoch import Epoch
    from embedding_service.cache.lru import LRU
    from embedding_service.core.catalog import Catalog
    from embedding_service.core.singleflight import Flights
    from embedding_service.observability.metrics import Metrics

L2_CHUNK = 256  # keys in one MGET: 400 kB at 384 dimensions, about 2 ms of Redis' one thread

TextFlight: TypeAlias = Flight[Miss, Resolved]


class Store(Protocol):
    """L2. It never raises; what it cannot find in its own short time limit is not there."""

    @property
    def connected(self) -> bool: ...

    async def get_many(self, epoch: int, keys: Sequence[bytes]) -> dict[bytes, Entry]: ...
    def put_soon(self, epoch: int, entries: Sequence[tuple[bytes, Entry]]) -> None: ...


class Upstream(Protocol):
    """The replicas. Every flight that is sent is settled by `Landing.settle`, once for its chunk."""

    def send(self, flights: Sequence[TextFlight]) -> None: ...
    def promote(self, flight: TextFlight) -> None: ...


class Landing:
    """Settles the flights of one chunk, and keeps the vectors that came with it."""

    def __init__(
        self,
        *,
        l1: LRU[Entry],
        l1_ttl_s: float,
        flights: Flights[Miss, Resolved],
        store: Store,
        catalog: Catalog,
        epoch: Epoch,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._l1 = l1
        self._l1_ttl_s = l1_ttl_s
        self._flights = flights
        self._store = store
        self._catalog = catalog
        self._epoch = epoch
        self._clock = clock

    def settle(self, flights: Sequence[TextFlight], result: Embedded | Exception) -> None:
        """One chunk has come back, or failed: its own flights settle, in one step."""
        failure = result if isinstance(result, Exception) else None
        try:
            if not isinstance(result, Exception):
                self._store_and_resolve(flights, result)
        except StartOver as changed:
            failure = changed
        finally:
            for flight in flights:
                if flight.state is not State.SETTLED:
                    self._flights.fail(flight, failure or _internal_error())

    def settle_found(self, flights: Sequence[TextFlight], found: dict[bytes, Entry]) -> None:
        """Resolves the flights whose entries L2 had."""
        fresh_until = self._clock() + self._l1_ttl_s
        for flight in flights:
            if (entry := found.get(flight.key)) is not None:
                if flight.ttl_s > 0:
                    miss = flight.payload
                    self._l1.put(miss.space.name(miss.text), entry, expires_at=min(fresh_until, entry.expires_at))
                self._flights.resolve(flight, Resolved(entry, Outcome.L2))

    def fail_unsent(self, flights: Sequence[TextFlight]) -> None:
        """Fails the flights that nothing will compute any more, since the gateway shuts down."""
        for flight in flights:
            if flight.state is State.CLAIMED:
                self._flights.fail(flight, Unavailable("the gateway is shutting down", retry_after_s=1))

    def _store_and_resolve(self, flights: Sequence[TextFlight], result: Embedded) -> None:
        """Raises `StartOver` if the vectors are another model's: they are kept, but under that model's own keys."""
        self._adopt(result)
        space = self._space_of(flights[0].payload.space, result)
        expected = space is flights[0].payload.space
        now = self._clock()
        fresh_until = now + self._l1_ttl_s
        writes = []
        rows = zip(flights, result.vectors, result.tokens.tolist(), result.truncated.tolist(), strict=True)
        for flight, vector, tokens, truncated in rows:
            entry = Entry(vector.tobytes(), tokens, truncated, now + flight.ttl_s)
            if flight.ttl_s > 0 and flight.payload.epoch == self._epoch.current:
                text = flight.payload.text
                self._l1.put(space.name(text), entry, expires_at=min(fresh_until, entry.expires_at))
                writes.append((flight.key if expected else space.key(text), entry))
            if expected:
                self._flights.resolve(flight, Resolved(entry, Outcome.UPSTREAM))
        self._store.put_soon(self._epoch.current, writes)
        if not expected:
            raise _model_changed()

    def _adopt(self, result: Embedded) -> None:
        """Tells the catalogue about the card of a reply, unless it is the card that is known already."""
        if not self._catalog.reachable or self._catalog.cards.get(result.card.id) != result.card:
            self._catalog.adopt(result.card)

    def _space_of(self, asked: KeySpace, result: Embedded) -> KeySpace:
        """Where the vectors of a reply belong: `asked`, or the key space of the model that computed them.

        Raises `StartOver` if that model lacks the prompt: then there is nothing to keep.
        """
        card = result.card
        try:
            if asked.covers(fingerprint=card.fingerprint, prompt=card.prompt(asked.prompt_name)):
                return asked
            return self._catalog.space(card, asked.prompt_name, asked.direction)
        except InvalidRequest:
            raise _model_changed() from None


def _internal_error() -> InferenceFailed:
    return InferenceFailed("internal error; the log has the detail")


def _model_changed() -> StartOver:
    return StartOver(Unavailable("the replicas have just changed to another model", retry_after_s=1))


class Fill:
    """Looks claimed flights up in L2 and sends the rest upstream. As a context manager it owns its tasks.

    A fill is the work of the service, not of the request that claimed it: it goes on when that request leaves.
    """

    def __init__(self, *, landing: Landing, store: Store, upstream: Upstream, epoch: Epoch, metrics: Metrics) -> None:
        self._landing = landing
        self._store = store
        self._upstream = upstream
        self._epoch = epoch
        self._metrics = metrics
        self._tasks: dict[asyncio.Task[None], list[TextFlight]] = {}

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
            self._landing.fail_unsent(flights)

    def start(self, flights: list[TextFlight], *, read: bool) -> None:
        """Takes claimed flights over. Without `read`, or without Redis, they go upstream at once."""
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
                self._take_found(chunk, found if epoch == self._epoch.current else {})
        finally:
            self._landing.fail_unsent(flights)

    def _take_found(self, chunk: Sequence[TextFlight], found: dict[bytes, Entry]) -> None:
        self._metrics.l2_lookups["hit"].inc(len(found))
        self._metrics.l2_lookups["miss"].inc(len(chunk) - len(found))
        self._landing.settle_found(chunk, found)
        self._upstream.send([flight for flight in chunk if flight.state is State.CLAIMED])
