"""Sends the load to a gateway or a storage server, and keeps what came of it."""

from __future__ import annotations

import asyncio
import math
import secrets
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Protocol

import aiohttp
import orjson
from client_http import BrokenReply, json_object, read_embed_reply

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

COMPARED_REQUESTS = 100  # vectors kept of a load, so that a long run does not hold all of them


class Refused(Exception):
    """No usable answer; the message says why in a few words."""


async def exchange(session: aiohttp.ClientSession, method: str, url: str, body: Any = None) -> tuple[int, bytes]:
    """Status and body. Raises `Refused` when there is no whole reply."""
    data = None if body is None else orjson.dumps(body)
    try:
        async with session.request(method, url, data=data) as response:
            return response.status, await response.read()
    except TimeoutError:
        raise Refused("no answer in time") from None
    except aiohttp.ClientConnectorError as problem:
        raise Refused(f"cannot connect to {problem.host}:{problem.port}") from None
    except aiohttp.ClientError as problem:
        raise Refused(f"{type(problem).__name__}: {problem}".removesuffix(": ")[:120]) from None


def refusal(status: int, body: bytes) -> Refused:
    """A status with the server's own word for it, if it has one."""
    told = json_object(body)
    return Refused(f"status {status}: {str(told['error'])[:80]}" if "error" in told else f"status {status}")


@dataclass(frozen=True, slots=True)
class Reply:
    """`cached` and `vectors` are None where the server does not tell."""

    seconds: float
    cached: int | None = None
    vectors: NDArray[np.float32] | None = None


class Target(Protocol):
    async def send(self, texts: Sequence[str]) -> Reply:
        """Raises `Refused`."""


class EmbedTarget:
    """`POST /embed` of the gateway; every reply is checked, not just its status."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = f"{url}/embed"

    async def send(self, texts: Sequence[str]) -> Reply:
        start_s = time.perf_counter()
        status, body = await exchange(self._session, "POST", self._url, {"texts": texts})
        seconds = time.perf_counter() - start_s
        if status != HTTPStatus.OK:
            raise refusal(status, body)
        try:
            reply = read_embed_reply(body, len(texts))
        except BrokenReply as broken:
            raise Refused(str(broken)) from None
        return Reply(seconds, reply.cached, reply.vectors)


class LearnTarget:
    """`POST /learn` of a storage server: the texts of a request become one content of as many paragraphs."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = f"{url}/learn"

    async def send(self, texts: Sequence[str]) -> Reply:
        content = {"content": "\n\n".join(texts), "metadata": {"source": "validate_scaling"}}
        start_s = time.perf_counter()
        status, body = await exchange(self._session, "POST", self._url, content)
        if status != HTTPStatus.CREATED:
            raise refusal(status, body)
        return Reply(time.perf_counter() - start_s)


@dataclass(slots=True)
class Load:
    """What came of one pass over the requests; `replies[i]` is None where request i failed."""

    replies: list[Reply | None]
    failures: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def answered(self) -> list[Reply]:
        return [reply for reply in self.replies if reply is not None]

    @property
    def success(self) -> float:
        return len(self.answered) / len(self.replies)

    @property
    def mean_ms(self) -> float:
        return statistics.fmean(reply.seconds for reply in self.answered) * 1000 if self.answered else math.nan

    def percentile_ms(self, percent: float) -> float:
        """Nearest rank: a latency that some request really had."""
        ordered = sorted(reply.seconds for reply in self.answered)
        return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)] * 1000 if ordered else math.nan

    def told(self) -> list[str]:
        return [f"{count} x {reason}" for reason, count in self.failures.most_common(5)]


class Texts:
    """Texts of this run alone, so that its first load cannot meet a cache; made again, not kept, for the second."""

    def __init__(self, per_request: int) -> None:
        self._run = secrets.token_hex(8)
        self._per_request = per_request

    def one(self) -> list[str]:
        return [f"A single text of run {self._run}, which no cache has seen."]

    def request(self, index: int) -> list[str]:
        return [
            f"Paragraph {part} of document {index}, run {self._run}: a paragraph about as long as people write them, "
            f"about topic {(index * 31 + part * 7) % 997}, so that a replica has some work to do for its vector."
            for part in range(self._per_request)
        ]


async def send_load(target: Target, texts: Texts, *, requests: int, concurrency: int) -> Load:
    load = Load([None] * requests)
    waiting = iter(range(requests))  # shared by the senders; nothing is awaited between taking and using an index

    async def sender() -> None:
        for index in waiting:
            try:
                reply = await target.send(texts.request(index))
            except Refused as problem:
                load.failures[str(problem)] += 1
                continue
            load.replies[index] = reply if index < COMPARED_REQUESTS else Reply(reply.seconds, reply.cached)

    start_s = time.perf_counter()
    async with asyncio.TaskGroup() as senders:
        for _ in range(min(concurrency, requests)):
            senders.create_task(sender())
    load.seconds = time.perf_counter() - start_s
    return load
