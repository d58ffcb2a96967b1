"""One exchange with a replica, through HAProxy: how it is asked, and what its reply means.

HAProxy tells on each reply which replica sent it, and sends a request that names one there if that one is up. A replica
is judged by the vectors that it sends. Nothing is asked twice here, except for connections that failed before anything
was sent; repetitions are made in retry.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import aiohttp
import orjson

from embedding_common.contract import (
    BINARY_TYPE,
    PRIORITY_HEADER,
    REQUEST_ID_HEADER,
    TIMEOUT_HEADER,
    Embedded,
    Lane,
    ModelList,
    Tokenized,
    WireError,
)
from embedding_service.errors import (
    DeadlineExceeded,
    InferenceFailed,
    InvalidRequest,
    Overloaded,
    Problem,
    Unavailable,
    UnknownModel,
)
from embedding_service.observability.log_throttle import LogThrottle

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, Self

    from embedding_common.contract import ModelCard
    from embedding_service.cache.entry import KeySpace
    from embedding_service.upstream.retry import Retry

T = TypeVar("T")

log = logging.getLogger(__name__)

CONNECT_S = 1.0  # HAProxy is a host away at most; its name too must be found by then, however mute name servers are
CONNECT_TRIES_S = 0.8  # a reload of HAProxy refuses connections for a moment; nothing has been sent, so repeat freely
CONNECT_PAUSE_S = 0.1
UNSENT_HEADER = "x-connection-retries"
"""On a 503 that HAProxy made itself: other than 0 if the replicas that it tried refused the connection. Replicas that
have just died, or just start, count as up until the next checks, and several at once can take all of its tries."""
REPLICA_HEADER = "x-replica"
"""On a reply of a replica: its name. On a request: the replica that it is for, another if that one is down."""
KEEP_ALIVE_S = 15.0  # shorter than HAProxy's client keep-alive, so that we are the one to close


EMBED = "/embed"
MODELS_TIMEOUT_S = 2.0
ASIDE_ID = "gateway-check"  # what a replica's log calls a text that no client asked for
PROBE_TEXT = "probe"  # computed to learn a model's card, and thrown away


class Broken(Exception):
    """A request that was sent came to nothing, but another replica may answer it. `problem` is what a caller is told if
    it is not repeated.

    `replica` is the one that answered with nothing that could be used; None if none answered. `in_doubt`: the fault may
    lie in the work as well as in the replica.
    """

    def __init__(self, problem: Problem, replica: str | None = None, *, in_doubt: bool = False) -> None:
        super().__init__(problem.message)
        self.problem = problem
        self.replica = replica
        self.in_doubt = in_doubt


class Balancer:
    """HTTP to HAProxy. As a context manager it owns the connections."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,  # bounded by the lanes' calls
                keepalive_timeout=KEEP_ALIVE_S,
                use_dns_cache=False,  # a container that was made anew has another address
            ),
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

        Connections that fail, here or behind HAProxy, are tried again for a moment: nothing has been sent on them.
        """
        assert self._session is not None, "used outside its context"  # noqa: S101 - for the type checker and misuse
        timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_S)  # the caller bounds the whole
        give_up_at = time.monotonic() + CONNECT_TRIES_S
        while True:
            try:
                async with self._session.request(
                    method, self._url + path, data=body, headers=headers, timeout=timeout, allow_redirects=False
                ) as reply:
                    try:
                        content = await reply.read()
                    except (aiohttp.ClientError, OSError) as cut:
                        problem = Unavailable(f"a reply was cut short: {type(cut).__name__}", retry_after_s=1)
                        raise Broken(problem, reply.headers.get(REPLICA_HEADER)) from None
                    if not _unsent(reply.status, reply.headers) or time.monotonic() > give_up_at:
                        return reply.status, reply.headers, content
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


def _unsent(status: int, headers: Mapping[str, str]) -> bool:
    """Whether HAProxy sent the request to no replica, though it takes some replicas to be up."""
    return status == 503 and headers.get(UNSENT_HEADER, "0") != "0"  # noqa: PLR2004 - HTTP


@dataclass(frozen=True, slots=True)
class EmbedCall:
    """The work of one call: texts of one key space. `give_up_at` is on the monotonic clock."""

    space: KeySpace
    texts: Sequence[str]
    lane: Lane
    request_id: str
    give_up_at: float


class Replicas:
    """All replicas behind HAProxy. Each method is one request, of `timeout_s` at most unless it says otherwise."""

    def __init__(self, *, balancer: Balancer, retry: Retry, timeout_s: float) -> None:
        self._balancer = balancer
        self._retry = retry
        self._timeout_s = timeout_s
        self._log_nonsense = LogThrottle(log.error)

    def __repr__(self) -> str:
        return f"<Replicas {self._retry!r}>"

    async def embed(self, call: EmbedCall) -> Embedded:
        """The first try of a call. The caller bounds its time, and repeats it if `Broken` is raised.

        Raises `Problem`, or `Broken` where another replica may do better.
        """
        self._retry.calls += 1
        named = self._retry.choose(repeatable=True) if self._retry.ejections.ejected else None
        return await self.send(call, named)

    async def send(self, call: EmbedCall, named: str | None) -> Embedded:
        """One try of a call, at the replica `named` if there is a name. Raises `Problem` or `Broken`."""
        headers = {
            "accept": BINARY_TYPE,
            "content-type": "application/json",
            PRIORITY_HEADER: call.lane.value,
            TIMEOUT_HEADER: str(max(1, int((call.give_up_at - time.monotonic()) * 1000))),
            REQUEST_ID_HEADER: call.request_id,
        }
        body = orjson.dumps(_embed_body(call.space, call.texts))
        read = partial(Embedded.from_bytes, texts=len(call.texts))
        return await self._exchange(EMBED, body, headers, read, named)

    async def embed_aside(self, space: KeySpace, text: str) -> Embedded:
        """The vector of one text that no caller waits for. Raises `Problem`."""
        headers = {"accept": BINARY_TYPE, PRIORITY_HEADER: Lane.BULK.value, REQUEST_ID_HEADER: ASIDE_ID}
        read = partial(Embedded.from_bytes, texts=1)
        return await self._ask_once(EMBED, _embed_body(space, [text]), headers, self._timeout_s, read)

    async def models(self) -> ModelList:
        """The models there are, by the replica that happens to be asked, within two seconds. Raises `Problem`."""
        return await self._ask_once("/models", None, {}, MODELS_TIMEOUT_S, ModelList.from_json)

    async def probe(self, model_id: str) -> ModelCard:
        """The card of a model, which its replica loads for it if it has to. Raises `Problem`."""
        headers = {"accept": BINARY_TYPE, PRIORITY_HEADER: Lane.INTERACTIVE.value}
        body = {"texts": [PROBE_TEXT], "model_id": model_id}
        read = partial(Embedded.from_bytes, texts=1)
        return (await self._ask_once(EMBED, body, headers, self._timeout_s, read)).card

    async def tokenize(self, body: Mapping[str, object], request_id: str) -> Tokenized:
        """The reply of `POST /tokenize`. Raises `Problem`."""
        headers = {REQUEST_ID_HEADER: request_id}
        return await self._ask_once("/tokenize", body, headers, self._timeout_s, Tokenized.from_json)

    async def _ask_once(
        self,
        path: str,
        body: Mapping[str, object] | None,
        headers: dict[str, str],
        timeout_s: float,
        read: Callable[[bytes], T],
    ) -> T:
        """One request beside the lanes, a GET without a body, never repeated. Raises `Problem`."""
        raw = None
        if body is not None:
            headers["content-type"] = "application/json"
            raw = orjson.dumps(body)
        named = self._retry.choose(repeatable=False) if self._retry.ejections.ejected else None
        try:
            async with asyncio.timeout(timeout_s):
                return await self._exchange(path, raw, headers, read, named)
        except Broken as failed:
            raise failed.problem from None
        except TimeoutError:
            raise Unavailable(f"no replica answered {path} within {timeout_s:g} s", retry_after_s=1) from None

    async def _exchange(
        self, path: str, raw: bytes | None, headers: dict[str, str], read: Callable[[bytes], T], named: str | None
    ) -> T:
        """Asks, reads and judges. Raises `Problem` or `Broken`.

        Only replies to `/embed` are judged: a replica that computes nonsense may well list its models.
        """
        ejections = self._retry.ejections
        if named is not None:
            headers[REPLICA_HEADER] = named
        try:
            method = "GET" if raw is None else "POST"
            status, reply_headers, reply = await self._balancer.request(method, path, raw, headers)
            replica = reply_headers.get(REPLICA_HEADER)
            if named is not None and replica not in (named, None):
                ejections.forget(named)
            result = self._read(path, replica, status, reply_headers, reply, read)
        except Broken as broken:
            if path == EMBED and broken.replica is not None and not broken.in_doubt:
                self._retry.blame(broken.replica)
            raise
        finally:
            if named is not None:
                ejections.done(named)
        if path == EMBED and replica is not None and replica not in ejections.in_good_standing:
            ejections.usable(replica)
        return result

    def _read(
        self,
        path: str,
        replica: str | None,
        status: int,
        headers: Mapping[str, str],
        reply: bytes,
        read: Callable[[bytes], T],
    ) -> T:
        """The meaning of a reply. Raises `Problem` or `Broken`."""
        if status != 200:  # noqa: PLR2004 - HTTP
            problem = _problem_of(status, headers, reply)
            if isinstance(problem, InferenceFailed) and replica and self._retry.ejections.has_good_besides(replica):
                raise Broken(problem, replica, in_doubt=True)
            raise problem
        try:
            return read(reply)
        except WireError as nonsense:
            self._log_nonsense("replica %s broke the contract of %s: %s", replica, path, nonsense)
            raise Broken(InferenceFailed("a replica sent an unusable reply"), replica) from None


def _embed_body(space: KeySpace, texts: Sequence[str]) -> dict[str, object]:
    return {
        "texts": texts,
        "model_id": space.model_id,
        "prompt_name": space.prompt_name,
        "truncation_direction": space.direction,
    }


def _problem_of(status: int, headers: Mapping[str, str], reply: bytes) -> Exception:
    """The exception for a reply other than 200: a `Problem`, or `Broken` if another replica may do better."""
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
        case 404 if detail.get("field") == "model_id":
            return UnknownModel(message, field="model_id", limit=detail.get("limit"), value=detail.get("value"))
        case 400 | 404 | 413 | 422:
            return InvalidRequest(
                message, field=detail.get("field"), limit=detail.get("limit"), value=detail.get("value")
            )
        case _:
            return InferenceFailed(f"a replica failed: {message}")
