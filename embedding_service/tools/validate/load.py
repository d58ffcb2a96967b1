"""Sends the load to a gateway or a storage server, and keeps the results."""

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

from embedding_service.tools.client.http import BrokenReply, json_object, read_embed_reply

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

COMPARED_REQUESTS = 100  # requests of a load whose vectors are kept, so that a long run does not hold all vectors


class Refused(Exception):
    """There is no usable answer. The message says why in a few words."""


async def exchange(session: aiohttp.ClientSession, method: str, url: str, body: Any = None) -> tuple[int, bytes]:
    """Returns status and body. Raises `Refused` if there is no complete reply."""
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
    """Returns an exception with the status and the server's own message, if it sent one."""
    told = json_object(body)
    return Refused(f"status {status}: {str(told['error'])[:80]}" if "error" in told else f"status {status}")


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply. `cached` and `vectors` are None if the server does not report them."""

    seconds: float
    cached: int | None = None
    vectors: NDArray[np.float32] | None = None


class Target(Protocol):
    """A server that takes the load."""

    async def send(self, texts: Sequence[str]) -> Reply:
        """Sends one request. Raises `Refused`."""


class EmbedTarget:
    """`POST /embed` of the gateway. Each reply is checked, not only its status."""

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
    """`POST /learn` of a storage server. The texts of a request become one content of as many paragraphs."""

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
    """The results of one pass over the requests. `replies[i]` is None if request i failed."""

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
        """Returns the percentile by nearest rank, which is a latency that some request really had."""
        ordered = sorted(reply.seconds for reply in self.answered)
        return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)] * 1000 if ordered else math.nan

    def told(self) -> list[str]:
        return [f"{count} x {reason}" for reason, count in self.failures.most_common(5)]


class Texts:
    """Makes texts that only this run has, so that no cache holds them at the first load.

    The second load makes the same texts again, so they are not kept in memory.
    """

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
    """Sends `requests` requests, at most `concurrency` at a time."""
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
