"""L2: entries shared by all gateways through Redis. It fails soft: whatever goes wrong here is a miss, and a metric.

Keys: `embedding:v1:entry:<epoch>:<digest>` for entries, `embedding:v1:epoch` for the clear counter,
`embedding:v1:cards` for the last model cards, by id. The epoch is part of an entry's name, so a write that was under
way when somebody cleared lands where nobody looks. It is a time in ns that only grows; every look-up reads it along,
so that a clear by another gateway is seen there and then, and the heartbeat sees it within a second when idle.

Breaker: a connection error, or two failures in a row, takes Redis out of use; the heartbeat alone takes it back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from redis.asyncio import BlockingConnectionPool, Connection, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import OutOfMemoryError, RedisError, ResponseError

from embedding_common.contract import INTERACTIVE_MAX_TEXTS, ModelCard, WireError
from embedding_service.cache.entry import Entry, pack, unpack

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence
    from typing import Self, TypeVar

    from embedding_service.observability.metrics import Metrics

    T = TypeVar("T")

log = logging.getLogger(__name__)

PREFIX = b"embedding:v1:"
EPOCH_KEY = PREFIX + b"epoch"
CARDS_KEY = PREFIX + b"cards"
DEFAULT_FIELD = b""  # of the cards: the default model's id, which no model has for a name

MAX_EPOCH = 1 << 62  # of a clock of nanoseconds: in the year 2116; one more must still fit the board's 64 bits
FOREIGN_EPOCH = -1  # bytes that nobody of ours wrote: below every epoch, so that the heartbeat writes ours over them
MAX_CONNECTIONS = 8  # two look-ups, the writer, the heartbeat, and whoever clears
MAX_QUEUED_WRITES = 8192  # entries; 13 MB at 384 dimensions, a minute of what three replicas compute
WRITES_PER_PIPELINE = 128
HEARTBEAT_S = 1.0
HEARTBEAT_TIMEOUT_S = 0.5  # more patient than a look-up: nobody waits for it
FAILURES_TO_OPEN = 2
MAX_READS = 2  # look-ups in flight: one that Redis answers and one that is on its way; more only makes each smaller
KEYS_PER_READ = 256  # 400 kB of reply at 384 dimensions, about 2 ms of Redis' one thread
FLUSH_S = 1.0  # at shutdown, for writes still queued

_FAILURES = (RedisError, OSError, TimeoutError)


class RedisCache:
    """The shared tier. As a context manager it owns its connections, the heartbeat and the writer.

    No method raises. No question to Redis takes longer than `timeout_s` but `clear`, which takes as long as the scan
    does; a look-up may have to wait for others before it is asked.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        password: str | None,
        timeout_s: float,
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.enabled = True
        self.connected = False
        self.on_epoch: Callable[[int], None] = _nobody_listens
        self._address = f"{host}:{port}"
        self._timeout_s = timeout_s
        self._metrics = metrics
        self._clock = clock
        self._epoch = 0
        self._failures = 0
        self._writes: deque[tuple[int, bytes, Entry]] = deque()
        self._writes_waiting = asyncio.Event()
        self._look_ups: deque[_LookUp] = deque()
        self._reads = 0
        self._few_go_first = False
        self._reading: dict[asyncio.Task[None], list[_LookUp]] = {}
        self._closing = False
        self._tasks: list[asyncio.Task[None]] = []
        self._redis = Redis.from_pool(
            BlockingConnectionPool(
                connection_class=_Connection,
                resolver=_Resolver(host, port),
                host=host,
                port=port,
                password=password,
                max_connections=MAX_CONNECTIONS,
                timeout=None,  # the limit of the whole call covers the wait for a connection
                socket_timeout=HEARTBEAT_TIMEOUT_S,
                socket_connect_timeout=HEARTBEAT_TIMEOUT_S,
                # once more on a pooled connection that has gone stale; the library's default is ten tries with backoff
                retry=Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
            )
        )

    def __repr__(self) -> str:
        return f"<RedisCache {self._address} connected={self.connected} queued_writes={len(self._writes)}>"

    async def __aenter__(self) -> Self:
        await self._beat()  # a gateway that starts beside a running Redis uses it from its first request on
        self._tasks = [asyncio.create_task(self._heartbeat()), asyncio.create_task(self._writer())]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing = True
        self._writes_waiting.set()
        await asyncio.wait(self._tasks[1:], timeout=FLUSH_S)  # the writer ends when it has nothing left to write
        under_way = dict(self._reading)
        for task in (*self._tasks, *under_way):
            task.cancel()
        await asyncio.gather(*self._tasks, *under_way, return_exceptions=True)
        for batch in (*under_way.values(), self._look_ups):  # a task cancelled before its first step answered nobody
            _answer(batch, {})
        await self._redis.aclose()

    async def get_many(self, epoch: int, keys: Sequence[bytes]) -> dict[bytes, Entry]:
        """The valid entries among `keys`; fewer, down to none, when Redis is slow, away or has been cleared.

        A call of the client library costs forty times what one more key costs (0.09 ms, 0.002 ms). So while all reads
        are busy, look-ups of different requests wait, and leave together when one comes back; when one is free they
        leave at once.
        """
        if not self.connected or self._closing or not keys:
            return {}
        look_up = _LookUp(epoch, keys, asyncio.get_running_loop().create_future())
        self._look_ups.append(look_up)
        self._start_reads()
        return await look_up.found

    def _start_reads(self) -> None:
        while self._look_ups and self._reads < MAX_READS and not self._closing:
            batch = self._next_batch()
            self._reads += 1
            task = asyncio.create_task(self._read(batch))
            self._reading[task] = batch
            task.add_done_callback(self._reading.pop)

    def _next_batch(self) -> list[_LookUp]:
        """Look-ups in order, of one epoch, up to the keys of one read, at least one.

        In every other batch those of few keys go first: where Redis is slow, people would wait for all earlier jobs.
        """
        self._few_go_first = not self._few_go_first
        if self._few_go_first:
            self._look_ups = deque(sorted(self._look_ups, key=lambda one: len(one.keys) > INTERACTIVE_MAX_TEXTS))
        batch = [self._look_ups.popleft()]
        keys = len(batch[0].keys)
        while (
            self._look_ups
            and self._look_ups[0].epoch == batch[0].epoch
            and (keys := keys + len(self._look_ups[0].keys)) <= KEYS_PER_READ
        ):
            batch.append(self._look_ups.popleft())
        return batch

    async def _read(self, batch: list[_LookUp]) -> None:
        found: dict[bytes, Entry] = {}
        try:
            found = await self._find(batch[0].epoch, [key for look_up in batch for key in look_up.keys])
        finally:
            self._reads -= 1
            _answer(batch, found)
            if not self.connected:  # the breaker has just opened: nobody waits for what will not come
                _answer(self._look_ups, {})
                self._look_ups.clear()
            self._start_reads()

    async def _find(self, epoch: int, keys: Sequence[bytes]) -> dict[bytes, Entry]:
        names = [EPOCH_KEY, *(_entry_name(epoch, key) for key in keys)]
        replies = await self._mget(names, "get", self._timeout_s)
        if replies is None or self._see_epoch(replies[0]) > epoch:
            return {}
        now = self._clock()
        found: dict[bytes, Entry] = {}
        for key, stored in zip(keys, replies[1:], strict=True):
            if stored is None:
                continue
            entry = unpack(key, stored)
            if entry is None:
                self._metrics.l2_rejected.inc()
            elif entry.expires_at > now:  # else over, and no damage: Redis is told whole seconds by its own clock
                found[key] = entry
        return found

    def put_soon(self, epoch: int, entries: Iterable[tuple[bytes, Entry]]) -> None:
        """Queues entries to be written; what finds no room, or no Redis, is dropped and counted."""
        for key, entry in entries:
            if not self.connected or len(self._writes) >= MAX_QUEUED_WRITES:
                self._metrics.l2_dropped.inc()
            else:
                self._writes.append((epoch, key, entry))
        self._writes_waiting.set()

    def raise_epoch(self, epoch: int) -> None:
        """What `clear` was told in a sibling process: Redis may be away, and that process gone before it is back."""
        self._epoch = max(self._epoch, epoch)

    async def clear(self, epoch: int) -> int | None:
        """Makes `epoch` the current one and unlinks all entries; how many, or None if Redis is away.

        Away, the epoch is raised by the next heartbeat that finds Redis, which has the same effect for readers.
        """
        self.raise_epoch(epoch)
        if not self.connected:
            return None
        try:
            written = False
            with contextlib.suppress(OutOfMemoryError):  # full, and evicts nothing: what is unlinked now makes room
                written = await self._write_epoch()
            removed = 0
            batch: list[bytes] = []
            async for name in self._redis.scan_iter(match=PREFIX + b"entry:*", count=1000):
                batch.append(name)
                if len(batch) >= 1000:  # noqa: PLR2004 - as many as one SCAN step names
                    removed += await self._redis.unlink(*batch)
                    batch.clear()
            removed += await self._redis.unlink(*batch) if batch else 0
            if not written:  # else another gateway may have written a later one meanwhile
                await self._write_epoch()
        except _FAILURES as failure:
            self._failed("set", failure)
            return None
        return removed

    async def remember(self, cards: Sequence[ModelCard]) -> None:
        """Keeps the cards, so that a gateway started while no replica is up can serve what is cached.

        The first is the default model's. Those of other models that another gateway has kept stay.
        """
        by_id: dict[Any, bytes] = {card.id.encode(): card.to_json().encode() for card in cards}
        by_id[DEFAULT_FIELD] = cards[0].id.encode()
        await self._guard("set", lambda: self._redis.hset(CARDS_KEY, mapping=by_id), self._timeout_s)

    async def recall(self) -> list[ModelCard]:
        """The cards kept last, the default model's first; none if Redis is away or has no default."""
        kept = await self._guard("get", self._hgetall, self._timeout_s)
        if not kept:
            return []
        default = kept.pop(DEFAULT_FIELD, b"")
        try:
            cards = {model_id: ModelCard.from_json(raw) for model_id, raw in kept.items()}
        except WireError as broken:
            log.warning("the model cards in Redis are unusable: %s", broken)
            return []
        return [cards.pop(default), *cards.values()] if default in cards else []

    # the library types one signature for its blocking and its asynchronous client

    async def _hgetall(self) -> dict[bytes, bytes]:
        return await cast("Awaitable[dict[bytes, bytes]]", self._redis.hgetall(CARDS_KEY.decode()))

    async def _mget(self, names: list[bytes], operation: str, limit_s: float) -> list[bytes | None] | None:
        return await self._guard(operation, lambda: self._values(names), limit_s)

    async def _values(self, names: list[bytes]) -> list[bytes | None]:
        """Raises `RedisError`, also for one in the midst of the list: a proxy says so of names it cannot reach."""
        # the library types replies as text or bytes; they are bytes unless decoding is asked for
        replies = cast("list[Any]", await self._redis.mget(names))
        for reply in replies:
            if isinstance(reply, RedisError):
                raise reply
        return replies

    async def _guard(self, operation: str, call: Callable[[], Awaitable[T]], limit_s: float) -> T | None:
        if not self.connected and operation != "ping":
            return None
        try:
            async with asyncio.timeout(limit_s):
                reply = await call()
        except _FAILURES as failure:
            self._failed(operation, failure)
            return None
        self._failures = 0
        return reply

    def _failed(self, operation: str, failure: Exception) -> None:
        self._metrics.l2_errors[operation].inc()
        self._failures += 1
        gone = isinstance(failure, RedisConnectionError | OSError) and not isinstance(failure, TimeoutError)
        if self.connected and (gone or operation == "ping" or self._failures >= FAILURES_TO_OPEN):
            self.connected = False
            self._metrics.l2_dropped.inc(len(self._writes))
            self._writes.clear()
            log.warning("Redis at %s is out of use (%s): %s", self._address, operation, _reason(failure))

    async def _heartbeat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            await self._beat()

    async def _beat(self) -> None:
        raw = await self._mget([EPOCH_KEY], "ping", HEARTBEAT_TIMEOUT_S)
        if raw is None:
            return
        # Behind ours if it was cleared while away, or lost its memory: names of the old epoch must stay unreachable.
        behind = self._see_epoch(raw[0]) < self._epoch
        if behind and not await self._guard("ping", self._write_epoch, HEARTBEAT_TIMEOUT_S):
            return
        if not self.connected:
            self.connected = True
            log.info("Redis at %s is in use", self._address)

    async def _write_epoch(self) -> bool:
        return bool(await self._redis.set(EPOCH_KEY, self._epoch))

    def _see_epoch(self, raw: bytes | None) -> int:
        """The epoch in Redis; one above ours is made ours, which empties L1."""
        try:
            seen = int(raw or 0)
        except ValueError:
            seen = FOREIGN_EPOCH
        if seen > MAX_EPOCH:
            seen = FOREIGN_EPOCH
        if seen > self._epoch:
            self._epoch = seen
            self.on_epoch(seen)
        return seen

    async def _writer(self) -> None:
        while self._writes or not self._closing:
            await self._writes_waiting.wait()
            self._writes_waiting.clear()
            while self._writes:
                await self._write_some()

    async def _write_some(self) -> None:
        taken = [self._writes.popleft() for _ in range(min(WRITES_PER_PIPELINE, len(self._writes)))]
        pipeline = self._redis.pipeline(transaction=False)
        now = self._clock()
        for epoch, key, entry in taken:
            lifetime_s = max(1, round(entry.expires_at - now))
            pipeline.set(_entry_name(epoch, key), pack(key, entry), ex=lifetime_s)
        replies = await self._guard("set", lambda: pipeline.execute(raise_on_error=False), HEARTBEAT_TIMEOUT_S)
        refused = len(taken) if replies is None else sum(isinstance(reply, ResponseError) for reply in replies)
        if refused:
            self._metrics.l2_dropped.inc(refused)
            if replies is not None:  # out of memory, or a read-only replica: said by Redis, not by the network
                self._metrics.l2_errors["set"].inc()


class NoCache(RedisCache):
    """What stands in for L2 where `REDIS_ENABLED` is false: opens no connection, so nothing is ever found or kept."""

    def __init__(self, *, metrics: Metrics) -> None:
        super().__init__(host="nowhere", port=0, password=None, timeout_s=1, metrics=metrics)
        self.enabled = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        return

    def put_soon(self, epoch: int, entries: Iterable[tuple[bytes, Entry]]) -> None:
        """Drops them uncounted: nobody expects them anywhere."""


class _Resolver:
    """Asks for one name's addresses, once at a time.

    A question cannot be taken back: whoever gives it up leaves a thread of the process waiting for the name server, and
    uvloop has two for that, which every connection to the balancer needs as well. If each heartbeat asked anew while
    no name server answers, the threads would soon be taken for ever, and no replica be reached for want of Redis.
    """

    def __init__(self, host: str, port: int) -> None:
        self._name = host, port
        self._asking: asyncio.Task[object] | None = None

    async def wait(self) -> None:
        """Until the name has just been resolved. Raises `OSError`."""
        if self._asking is None or self._asking.done():
            asking = asyncio.get_running_loop().getaddrinfo(*self._name, type=socket.SOCK_STREAM)
            self._asking = asyncio.ensure_future(asking)
            self._asking.add_done_callback(_heard)  # whoever waited may have gone before it failed
        await asyncio.shield(self._asking)


def _heard(asking: asyncio.Task[object]) -> None:
    if not asking.cancelled():
        asking.exception()


class _Connection(Connection):
    """One that is not opened before the name is known to be resolved: to open it asks again, at once then."""

    def __init__(self, *, resolver: _Resolver, **terms: Any) -> None:
        super().__init__(**terms)
        self._resolver = resolver

    async def _connect(self) -> None:
        async with asyncio.timeout(self.socket_connect_timeout):
            await self._resolver.wait()
        await super()._connect()  # type: ignore[no-untyped-call]  # the library types few of its methods


@dataclass(frozen=True, slots=True)
class _LookUp:
    epoch: int
    keys: Sequence[bytes]
    found: asyncio.Future[dict[bytes, Entry]]


def _answer(batch: Iterable[_LookUp], found: dict[bytes, Entry]) -> None:
    for look_up in batch:
        if not look_up.found.done():  # its request may have gone
            look_up.found.set_result({key: found[key] for key in look_up.keys if key in found})


def _nobody_listens(epoch: int) -> None:
    log.debug("epoch %d, and no L1 to empty", epoch)


def _entry_name(epoch: int, key: bytes) -> bytes:
    return b"%sentry:%d:%s" % (PREFIX, epoch, key.hex().encode())


def _reason(failure: Exception) -> str:
    return str(failure) or type(failure).__name__
