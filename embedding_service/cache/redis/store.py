"""L2: the entries that all gateways share through Redis, and the model cards that outlive the replicas.

Names in Redis: `embedding:v1:entry:<epoch>:<digest>` for entries, `embedding:v1:epoch` for the epoch of the last clear,
`embedding:v1:cards` for the last model cards, by model id. The epoch is a part of an entry's name (see cache/epoch.py).
Every look-up reads the epoch along, so a clear by another gateway is seen with the next look-up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from redis.exceptions import OutOfMemoryError, ResponseError

from embedding_common.contract import INTERACTIVE_MAX_TEXTS, ModelCard, WireError
from embedding_service.cache.entry import Entry, pack, unpack
from embedding_service.cache.redis.client import EPOCH_KEY, FAILURES, HEARTBEAT_TIMEOUT_S, PREFIX, RedisClient

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence
    from typing import Self

    from embedding_service.observability.metrics import Metrics

log = logging.getLogger(__name__)

CARDS_KEY = PREFIX + b"cards"
DEFAULT_FIELD = b""  # among the cards: the default model's id; no model has this name

MAX_QUEUED_WRITES = 8192  # entries; 13 MB at 384 dimensions, a minute of what three replicas compute
WRITES_PER_PIPELINE = 128
MAX_READS = 2  # reads in flight: one that Redis answers and one on its way; more only makes each smaller
KEYS_PER_READ = 256  # 400 kB of reply at 384 dimensions, about 2 ms of Redis' one thread
NAMES_PER_SCAN = 1000
FLUSH_S = 1.0  # at shutdown, for writes still queued


@dataclass(frozen=True, slots=True)
class _LookUp:
    """The keys that one fill asks for, and the future that takes what was found."""

    epoch: int
    keys: Sequence[bytes]
    found: asyncio.Future[dict[bytes, Entry]]


class RedisStore:
    """The shared tier. As a context manager it owns the client, the reads and the writer.

    No method raises. A question to Redis takes at most `timeout_s`, except for `clear`, which takes as long as its scan
    does; a look-up may wait for other look-ups before it is asked.
    """

    enabled = True

    def __init__(
        self, *, client: RedisClient, timeout_s: float, metrics: Metrics, clock: Callable[[], float] = time.time
    ) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._metrics = metrics
        self._clock = clock
        self._writes: deque[tuple[int, bytes, Entry]] = deque()
        self._writes_waiting = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        self._look_ups: deque[_LookUp] = deque()
        self._reads: dict[asyncio.Task[None], list[_LookUp]] = {}
        self._reading = 0  # reads in flight
        self._few_keys_first = False
        self._closing = False

    def __repr__(self) -> str:
        return f"<RedisStore {self._client!r} queued_writes={len(self._writes)}>"

    @property
    def connected(self) -> bool:
        """Whether Redis is in use."""
        return self._client.connected

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        self._writer = asyncio.create_task(self._write_for_ever())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closing = True
        self._writes_waiting.set()
        assert self._writer is not None, "left before it was entered"  # noqa: S101 - for the type checker and misuse
        await asyncio.wait((self._writer,), timeout=FLUSH_S)  # it ends when it has nothing left to write
        under_way = dict(self._reads)
        for task in (self._writer, *under_way):
            task.cancel()
        await asyncio.gather(self._writer, *under_way, return_exceptions=True)
        for look_ups in (*under_way.values(), self._look_ups):  # a task cancelled before its first step answered none
            _answer(look_ups, {})
        await self._client.__aexit__()

    # --- reads ---

    async def get_many(self, epoch: int, keys: Sequence[bytes]) -> dict[bytes, Entry]:
        """The valid entries among `keys`; fewer, down to none, when Redis is slow, away or has been cleared.

        A call of the client library costs forty times what one more key costs (0.09 ms, 0.002 ms). So while all reads
        are busy, look-ups of different requests wait, and leave together when one comes back; when one is free they
        leave at once.
        """
        if not self._client.connected or self._closing or not keys:
            return {}
        look_up = _LookUp(epoch, keys, asyncio.get_running_loop().create_future())
        self._look_ups.append(look_up)
        self._start_reads()
        return await look_up.found

    def _start_reads(self) -> None:
        while self._look_ups and self._reading < MAX_READS and not self._closing:
            look_ups = self._next_read()
            self._reading += 1
            task = asyncio.create_task(self._read(look_ups))
            self._reads[task] = look_ups
            task.add_done_callback(self._reads.pop)

    def _next_read(self) -> list[_LookUp]:
        """The look-ups of one read: in order, of one epoch, up to the keys of a read, at least one look-up.

        In every other read, look-ups of few keys go first: where Redis is slow, people would wait for all earlier jobs.
        """
        self._few_keys_first = not self._few_keys_first
        if self._few_keys_first:
            self._look_ups = deque(sorted(self._look_ups, key=lambda one: len(one.keys) > INTERACTIVE_MAX_TEXTS))
        chosen = [self._look_ups.popleft()]
        keys = len(chosen[0].keys)
        while (
            self._look_ups
            and self._look_ups[0].epoch == chosen[0].epoch
            and (keys := keys + len(self._look_ups[0].keys)) <= KEYS_PER_READ
        ):
            chosen.append(self._look_ups.popleft())
        return chosen

    async def _read(self, look_ups: list[_LookUp]) -> None:
        found: dict[bytes, Entry] = {}
        try:
            found = await self._find(look_ups[0].epoch, [key for look_up in look_ups for key in look_up.keys])
        finally:
            self._reading -= 1
            _answer(look_ups, found)
            if not self._client.connected:  # the breaker has just opened: no look-up waits for what will not come
                _answer(self._look_ups, {})
                self._look_ups.clear()
            self._start_reads()

    async def _find(self, epoch: int, keys: Sequence[bytes]) -> dict[bytes, Entry]:
        names = [EPOCH_KEY, *(entry_name(epoch, key) for key in keys)]
        replies = await self._client.get_values(names, "get", limit_s=self._timeout_s)
        if replies is None or self._client.see_epoch(replies[0]) > epoch:
            return {}
        now = self._clock()
        found: dict[bytes, Entry] = {}
        for key, stored in zip(keys, replies[1:], strict=True):
            if stored is None:
                continue
            entry = unpack(key, stored)
            if entry is None:
                self._metrics.l2_rejected.inc()
            elif entry.expires_at > now:  # else it has expired, which is no damage: Redis counts whole seconds
                found[key] = entry
        return found

    # --- writes ---

    def put_soon(self, epoch: int, entries: Iterable[tuple[bytes, Entry]]) -> None:
        """Queues entries to be written; entries that find no room, or no Redis, are dropped and counted."""
        for key, entry in entries:
            if not self._client.connected or len(self._writes) >= MAX_QUEUED_WRITES:
                self._metrics.l2_dropped.inc()
            else:
                self._writes.append((epoch, key, entry))
        self._writes_waiting.set()

    async def _write_for_ever(self) -> None:
        while self._writes or not self._closing:
            await self._writes_waiting.wait()
            self._writes_waiting.clear()
            while self._writes:
                await self._write_some()

    async def _write_some(self) -> None:
        taken = [self._writes.popleft() for _ in range(min(WRITES_PER_PIPELINE, len(self._writes)))]
        pipeline = self._client.redis.pipeline(transaction=False)
        now = self._clock()
        for epoch, key, entry in taken:
            lifetime_s = max(1, round(entry.expires_at - now))
            pipeline.set(entry_name(epoch, key), pack(key, entry), ex=lifetime_s)
        replies = await self._client.call(
            "set", lambda: pipeline.execute(raise_on_error=False), limit_s=HEARTBEAT_TIMEOUT_S
        )
        if not self._client.connected:  # the breaker is open: what is still queued has no Redis either
            self._metrics.l2_dropped.inc(len(self._writes))
            self._writes.clear()
        refused = len(taken) if replies is None else sum(isinstance(reply, ResponseError) for reply in replies)
        if refused:
            self._metrics.l2_dropped.inc(refused)
            if replies is not None:  # out of memory, or a read-only replica: Redis says it, not the network
                self._metrics.l2_errors["set"].inc()

    async def clear(self) -> int | None:
        """Writes the current epoch and unlinks all entries; returns how many, or None if Redis is away.

        If it is away, the heartbeat that next finds Redis writes the epoch, which has the same effect for readers.
        """
        if not self._client.connected:
            return None
        try:
            written = False
            with contextlib.suppress(OutOfMemoryError):  # a full Redis that evicts nothing: unlinking makes the room
                written = await self._client.write_epoch()
            removed = await self._unlink_entries()
            if not written:  # else another gateway may have written a later epoch meanwhile
                await self._client.write_epoch()
        except FAILURES as failure:
            self._client.failed("set", failure)
            return None
        return removed

    async def _unlink_entries(self) -> int:
        redis = self._client.redis
        removed = 0
        names: list[bytes] = []
        async for name in redis.scan_iter(match=PREFIX + b"entry:*", count=NAMES_PER_SCAN):
            names.append(name)
            if len(names) >= NAMES_PER_SCAN:
                removed += await redis.unlink(*names)
                names.clear()
        return removed + (await redis.unlink(*names) if names else 0)

    # --- model cards ---

    async def remember(self, cards: Sequence[ModelCard]) -> None:
        """Keeps the cards, so that a gateway started while no replica is up can serve what is cached.

        The first card is the default model's. Cards of other models that another gateway has kept stay.
        """
        by_id: dict[Any, bytes] = {card.id.encode(): card.to_json().encode() for card in cards}
        by_id[DEFAULT_FIELD] = cards[0].id.encode()
        await self._client.call(
            "set", lambda: self._client.redis.hset(CARDS_KEY, mapping=by_id), limit_s=self._timeout_s
        )

    async def recall(self) -> list[ModelCard]:
        """The cards kept last, the default model's first; none if Redis is away or has no default."""
        kept = await self._client.call("get", self._kept_cards, limit_s=self._timeout_s)
        if not kept:
            return []
        default = kept.pop(DEFAULT_FIELD, b"")
        try:
            cards = {model_id: ModelCard.from_json(raw) for model_id, raw in kept.items()}
        except WireError as broken:
            log.warning("the model cards in Redis are unusable: %s", broken)
            return []
        return [cards.pop(default), *cards.values()] if default in cards else []

    async def _kept_cards(self) -> dict[bytes, bytes]:
        # the library types one signature for its blocking and its asynchronous client
        return await cast("Awaitable[dict[bytes, bytes]]", self._client.redis.hgetall(CARDS_KEY.decode()))


def entry_name(epoch: int, key: bytes) -> bytes:
    """The name of an entry in Redis."""
    return b"%sentry:%d:%s" % (PREFIX, epoch, key.hex().encode())


def _answer(look_ups: Iterable[_LookUp], found: dict[bytes, Entry]) -> None:
    for look_up in look_ups:
        if not look_up.found.done():  # its request may have gone
            look_up.found.set_result({key: found[key] for key in look_up.keys if key in found})
