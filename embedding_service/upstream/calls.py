"""What the replicas can be asked: whom a request goes to, and what its reply means.

A replica is judged by the vectors it sends. Its reply tells who it is; `Ejections` counts, and says whom the next
request has to name. Nothing is asked twice here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from functools import partial
from typing import TYPE_CHECKING, TypeVar

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
    Unavailable,
    UnknownModel,
)
from embedding_service.observability.log_throttle import Seldom
from embedding_service.upstream.ejection import Ejections
from embedding_service.upstream.http import REPLICA_HEADER, Broken

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from embedding_common.contract import ModelCard
    from embedding_service.cache.entry import KeySpace
    from embedding_service.observability.metrics import Metrics
    from embedding_service.upstream.http import Balancer

T = TypeVar("T")

log = logging.getLogger(__name__)

EMBED = "/embed"
MODELS_TIMEOUT_S = 2.0
ASIDE_ID = "gateway-check"  # what a replica's log calls a text that no client asked for
PROBE_TEXT = "probe"  # computed to learn a model's card, and thrown away


class Replicas:
    """All replicas behind HAProxy. Each method is one request, of `timeout_s` at most unless it says otherwise."""

    def __init__(self, *, balancer: Balancer, timeout_s: float, metrics: Metrics) -> None:
        self.timeout_s = timeout_s
        self._balancer = balancer
        self._metrics = metrics
        self._ejections = Ejections()
        self._tell_nonsense = Seldom(log.error)

    def __repr__(self) -> str:
        return f"<Replicas {self._ejections!r}>"

    @property
    def ejected(self) -> int:
        """How many get no calls but tries, as what they answered could not be used."""
        return len(self._ejections)

    async def embed(
        self,
        space: KeySpace,
        texts: Sequence[str],
        *,
        lane: Lane,
        request_id: str,
        within_s: float,
        avoid: str | None = None,
        may_try: bool = False,
    ) -> Embedded:
        """Vectors of texts for which somebody waits `within_s` longer; the caller bounds the call itself.

        Raises `Problem`, or `Broken` where another replica may do better: the caller then repeats to `avoid` the one
        that failed. A call that the caller would repeat `may_try` an ejected replica.
        """
        headers = {
            "accept": BINARY_TYPE,
            PRIORITY_HEADER: lane.value,
            TIMEOUT_HEADER: str(max(1, int(within_s * 1000))),
            REQUEST_ID_HEADER: request_id,
        }
        read = partial(Embedded.from_bytes, texts=len(texts))
        return await self._ask(EMBED, _body(space, texts), headers, read, avoid=avoid, may_try=may_try)

    async def embed_aside(self, space: KeySpace, text: str) -> Embedded:
        """One text that nobody waits for. Raises `Problem`."""
        headers = {"accept": BINARY_TYPE, PRIORITY_HEADER: Lane.BULK.value, REQUEST_ID_HEADER: ASIDE_ID}
        read = partial(Embedded.from_bytes, texts=1)
        return await self._exchange(EMBED, _body(space, [text]), headers, self.timeout_s, read)

    async def models(self) -> ModelList:
        """Which models there are, by the replica that happens to be asked, in two seconds. Raises `Problem`."""
        return await self._exchange("/models", None, {}, MODELS_TIMEOUT_S, ModelList.from_json)

    async def probe(self, model_id: str) -> ModelCard:
        """The card of a model, which its replica loads for it if need be. Raises `Problem`."""
        headers = {"accept": BINARY_TYPE, PRIORITY_HEADER: Lane.INTERACTIVE.value}
        body = {"texts": [PROBE_TEXT], "model_id": model_id}
        read = partial(Embedded.from_bytes, texts=1)
        return (await self._exchange(EMBED, body, headers, self.timeout_s, read)).card

    async def tokenize(self, body: Mapping[str, object], request_id: str) -> Tokenized:
        """Their `POST /tokenize`. Raises `Problem`."""
        headers = {REQUEST_ID_HEADER: request_id}
        return await self._exchange("/tokenize", body, headers, self.timeout_s, Tokenized.from_json)

    def blame(self, name: str) -> None:
        """It has answered with what cannot be used."""
        self._metrics.unusable_replies.inc()
        self._ejections.unusable(name)

    async def _exchange(
        self,
        path: str,
        body: Mapping[str, object] | None,
        headers: dict[str, str],
        timeout_s: float,
        read: Callable[[bytes], T],
    ) -> T:
        """One request beside the lanes, never repeated. Raises `Problem`."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._ask(path, body, headers, read)
        except Broken as failed:
            raise failed.problem from None
        except TimeoutError:
            raise Unavailable(f"no replica answered {path} within {timeout_s:g} s", retry_after_s=1) from None

    async def _ask(
        self,
        path: str,
        body: Mapping[str, object] | None,
        headers: dict[str, str],
        read: Callable[[bytes], T],
        *,
        avoid: str | None = None,
        may_try: bool = False,
    ) -> T:
        """One request, a GET without a body. Raises `Problem`, or `Broken` where another replica may do better.

        No judgement follows from other paths than that of vectors: a liar may well list its models.
        """
        if body is not None:
            headers["content-type"] = "application/json"
        named = self._ejections.choose(avoid=avoid, may_try=may_try)
        if named is not None:
            headers[REPLICA_HEADER] = named
        try:
            replica, result = await self._send(path, body, headers, read)
        except Broken as broken:
            if path == EMBED and broken.replica is not None and not broken.in_doubt:
                self.blame(broken.replica)
            raise
        finally:
            if named is not None:
                self._ejections.done(named)
        if path == EMBED and replica is not None:
            self._ejections.usable(replica)
        return result

    async def _send(
        self,
        path: str,
        body: Mapping[str, object] | None,
        headers: Mapping[str, str],
        read: Callable[[bytes], T],
    ) -> tuple[str | None, T]:
        """Who answered, and what. Raises `Problem` or `Broken`."""
        raw = None if body is None else orjson.dumps(body)
        status, reply_headers, reply = await self._balancer.request("POST" if raw else "GET", path, raw, headers)
        replica = reply_headers.get(REPLICA_HEADER)
        named = headers.get(REPLICA_HEADER)
        if named is not None and replica not in (named, None):
            self._ejections.forget(named)
        if status != 200:  # noqa: PLR2004
            problem = _problem_of(status, reply_headers, reply)
            if isinstance(problem, InferenceFailed) and replica and self._ejections.has_good_besides(replica):
                raise Broken(problem, replica, in_doubt=True)
            raise problem
        try:
            return replica, read(reply)
        except WireError as nonsense:
            self._tell_nonsense("replica %s broke the contract of %s: %s", replica, path, nonsense)
            raise Broken(InferenceFailed("a replica sent an unusable reply"), replica) from None


def _body(space: KeySpace, texts: Sequence[str]) -> dict[str, object]:
    return {
        "texts": texts,
        "model_id": space.model_id,
        "prompt_name": space.prompt_name,
        "truncation_direction": space.direction,
    }


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
        case 404 if detail.get("field") == "model_id":
            return UnknownModel(message, field="model_id", limit=detail.get("limit"), value=detail.get("value"))
        case 400 | 404 | 413 | 422:
            return InvalidRequest(
                message, field=detail.get("field"), limit=detail.get("limit"), value=detail.get("value")
            )
        case _:
            return InferenceFailed(f"a replica failed: {message}")
