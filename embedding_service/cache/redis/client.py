"""The connection to Redis: its time limits, its breaker, its heartbeat, and the epoch that Redis holds.

Whatever goes wrong here is a miss and a metric, never an error of a request. The breaker: a connection error, or two
failures in a row, takes Redis out of use; only the heartbeat takes it back into use.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import TYPE_CHECKING, Any, cast

from redis.asyncio import BlockingConnectionPool, Connection, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Self, TypeVar

    from embedding_service.cache.epoch import Epoch
    from embedding_service.observability.metrics import Metrics

    T = TypeVar("T")

log = logging.getLogger(__name__)

PREFIX = b"embedding:v1:"
EPOCH_KEY = PREFIX + b"epoch"

MAX_EPOCH = 1 << 62
"""The latest epoch that is believed: the year 2116 in nanoseconds. One more must still fit the scoreboard's 64 bits."""
FOREIGN_EPOCH = -1
"""Stands for bytes that no gateway wrote. It is below every epoch, so the heartbeat writes our epoch over them."""
MAX_CONNECTIONS = 8  # two look-ups, the writer, the heartbeat, and requests that clear
HEARTBEAT_S = 1.0
HEARTBEAT_TIMEOUT_S = 0.5  # more patient than a look-up, since no request waits for it
FAILURES_TO_OPEN = 2

FAILURES = (RedisError, OSError, TimeoutError)


class RedisClient:
    """Redis behind a breaker. As a context manager it owns the connections and the heartbeat.

    `connected` tells whether Redis is in use. `call` never raises; no call takes longer than its own time limit.
    """

    def __init__(self, *, host: str, port: int, password: str | None, epoch: Epoch, metrics: Metrics) -> None:
        self.connected = False
        self.epoch = epoch
        self.address = f"{host}:{port}"
        self._metrics = metrics
        self._failures = 0
        self._heartbeat: asyncio.Task[None] | None = None
        self.redis = Redis.from_pool(
            BlockingConnectionPool(
                connection_class=_Connection,
                resolver=_Resolver(host, port),
                host=host,
                port=port,
                password=password,
                max_connections=MAX_CONNECTIONS,
                timeout=None,  # the time limit of the whole call covers the wait for a connection
                socket_timeout=HEARTBEAT_TIMEOUT_S,
                socket_connect_timeout=HEARTBEAT_TIMEOUT_S,
                # once more on a pooled connection that has gone stale; the library's default is ten tries with backoff
                retry=Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
            )
        )

    def __repr__(self) -> str:
        return f"<RedisClient {self.address} connected={self.connected}>"

    async def __aenter__(self) -> Self:
        await self.beat()  # a gateway that starts beside a running Redis uses it from its first request on
        self._heartbeat = asyncio.create_task(self._beat_for_ever())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._heartbeat is not None:
            self._heartbeat.cancel()
            await asyncio.gather(self._heartbeat, return_exceptions=True)
        await self.redis.aclose()

    async def call(self, operation: str, ask: Callable[[], Awaitable[T]], *, limit_s: float) -> T | None:
        """The reply of `ask`, or None if Redis is out of use or the call failed. `operation` labels the metric."""
        if not self.connected and operation != "ping":
            return None
        try:
            async with asyncio.timeout(limit_s):
                reply = await ask()
        except FAILURES as failure:
            self.failed(operation, failure)
            return None
        self._failures = 0
        return reply

    async def get_values(self, names: list[bytes], operation: str, *, limit_s: float) -> list[bytes | None] | None:
        """The values under `names`, in their order; None if Redis is out of use or the call failed."""
        return await self.call(operation, lambda: self._mget(names), limit_s=limit_s)

    async def _mget(self, names: list[bytes]) -> list[bytes | None]:
        """Raises `RedisError`, also for an error in the middle of the list: a proxy answers so for a lost server."""
        # the library types replies as text or bytes; they are bytes unless decoding is asked for
        replies = cast("list[Any]", await self.redis.mget(names))
        for reply in replies:
            if isinstance(reply, RedisError):
                raise reply
        return replies

    def failed(self, operation: str, failure: Exception) -> None:
        """Counts a failed call, and opens the breaker if this was one failure too many."""
        self._metrics.l2_errors[operation].inc()
        self._failures += 1
        gone = isinstance(failure, RedisConnectionError | OSError) and not isinstance(failure, TimeoutError)
        if self.connected and (gone or operation == "ping" or self._failures >= FAILURES_TO_OPEN):
            self.connected = False
            log.warning("Redis at %s is out of use (%s): %s", self.address, operation, _reason(failure))

    # --- the epoch and the heartbeat ---

    def see_epoch(self, raw: bytes | None) -> int:
        """The epoch that Redis holds. A later one than ours becomes ours, which empties L1."""
        try:
            seen = int(raw or 0)
        except ValueError:
            seen = FOREIGN_EPOCH
        if seen > MAX_EPOCH:
            seen = FOREIGN_EPOCH
        if seen > self.epoch.current:
            self.epoch.raise_to(seen)
        return seen

    async def write_epoch(self) -> bool:
        return bool(await self.redis.set(EPOCH_KEY, self.epoch.current))

    async def beat(self) -> None:
        """One heartbeat: asks whether Redis answers, and takes it back into use if it does."""
        raw = await self.get_values([EPOCH_KEY], "ping", limit_s=HEARTBEAT_TIMEOUT_S)
        if raw is None:
            return
        # Redis is behind if it was cleared while away, or lost its memory: names of the old epoch must stay unreachable
        behind = self.see_epoch(raw[0]) < self.epoch.current
        if behind and not await self.call("ping", self.write_epoch, limit_s=HEARTBEAT_TIMEOUT_S):
            return
        if not self.connected:
            self.connected = True
            log.info("Redis at %s is in use", self.address)

    async def _beat_for_ever(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            await self.beat()


class _Resolver:
    """Asks the name server for the addresses of one name, one question at a time.

    A question cannot be taken back: a caller that gives up leaves a thread waiting for the name server, and uvloop has
    two threads for that, which every connection to the balancer needs as well. If each heartbeat asked anew while no
    name server answers, both threads would soon be taken for ever, and no replica could be reached because of Redis.
    """

    def __init__(self, host: str, port: int) -> None:
        self._name = host, port
        self._question: asyncio.Task[object] | None = None

    async def wait(self) -> None:
        """Returns when the name has just been resolved. Raises `OSError`."""
        if self._question is None or self._question.done():
            question = asyncio.get_running_loop().getaddrinfo(*self._name, type=socket.SOCK_STREAM)
            self._question = asyncio.ensure_future(question)
            self._question.add_done_callback(_mark_retrieved)  # its waiters may have left before it failed
        await asyncio.shield(self._question)


def _mark_retrieved(question: asyncio.Task[object]) -> None:
    if not question.cancelled():
        question.exception()


class _Connection(Connection):
    """A connection that opens only after its name was resolved: it resolves the name once more, at once then."""

    def __init__(self, *, resolver: _Resolver, **terms: Any) -> None:
        super().__init__(**terms)
        self._resolver = resolver

    async def _connect(self) -> None:
        async with asyncio.timeout(self.socket_connect_timeout):
            await self._resolver.wait()
        await super()._connect()  # type: ignore[no-untyped-call]  # the library types few of its methods


def _reason(failure: Exception) -> str:
    return str(failure) or type(failure).__name__
