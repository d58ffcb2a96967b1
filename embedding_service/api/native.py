"""`POST /embed` with `texts`: the native dialect. Bytes to an Ask, an Answer to bytes."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from embedding_service.ask import Ask
from embedding_service.singleflight import NEVER
from ml_base import asgi, native
from ml_base.wire import FINGERPRINT_HEADER, PRIORITY_HEADER, TIMEOUT_HEADER, choose_lane, parse_timeout_s

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from embedding_service.ask import Answer
    from embedding_service.catalog import Catalog
    from embedding_service.embedder import Embedder


class NativeDialect:
    """The endpoint, with the limits it checks."""

    def __init__(
        self,
        *,
        embedder: Embedder,
        catalog: Catalog,
        max_texts: int,
        max_text_bytes: int,
        max_body_bytes: int,
        edition: str,
    ) -> None:
        self._embedder = embedder
        self._catalog = catalog
        self._max_texts = max_texts
        self._max_text_bytes = max_text_bytes
        self._max_body_bytes = max_body_bytes
        self._edition = edition

    def route(self) -> asgi.AsgiRoute:
        refusals = {status: {"model": native.ErrorReply} for status in (400, 404, 413, 422, 429, 500, 503, 504)}
        return asgi.AsgiRoute(
            "/embed", _documented, asgi=asgi.guarded(self._embed), methods=["POST"], responses=refusals, tags=["embed"]
        )

    async def _embed(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        body = await asgi.read_body(scope, receive, limit_bytes=self._max_body_bytes)
        request = native.parse(body, max_texts=self._max_texts, max_text_bytes=self._max_text_bytes)
        timeout_s = parse_timeout_s(asgi.header(scope, TIMEOUT_HEADER))
        native.check_dimensions(request.dimensions, self._catalog.card(request.model_id))
        answer = await self._embedder.embed(
            Ask(
                texts=request.texts,
                lane=choose_lane(asgi.header(scope, PRIORITY_HEADER), len(request.texts)),
                request_id=scope["state"]["request_id"],
                model_id=request.model_id,
                prompt_name=request.prompt_name,
                direction=request.truncation_direction or "right",
                deadline=NEVER if timeout_s is None else time.monotonic() + timeout_s,
                ttl_s=request.cache_ttl_seconds,
                bypass="no-cache" in (asgi.header(scope, "cache-control") or ""),
                caller_gone=lambda: asgi.disconnected(receive),
            )
        )
        await self._reply(send, request, answer, started)

    async def _reply(self, send: Send, request: native.EmbedRequest, answer: Answer, started: float) -> None:
        if request.truncate is False:
            for index, entry in enumerate(answer.entries):
                if entry.truncated:
                    raise native.refuse_truncated(index, entry.tokens, answer.card)
        vectors = native.shape(
            answer.vectors(), dimensions=request.dimensions, normalize=request.normalize is not False
        )
        parts = []
        for part in native.rows_as_json(vectors):
            parts.append(part)
            if len(vectors) > native.ROWS_PER_CHUNK:
                await asyncio.sleep(0)  # others' cached answers go out between the chunks of a large one
        before, after = native.reply_around(
            vectors,
            model=answer.card.id,
            took_s=time.perf_counter() - started,
            cached=answer.cached_count(),
            edition=self._edition,
        )
        headers = [(FINGERPRINT_HEADER.encode(), answer.card.fingerprint.encode())]
        await asgi.send_bytes(send, 200, [before, *parts, after], headers=headers)


def _documented(body: native.EmbedRequest) -> native.EmbedReply:  # type: ignore[empty-body]  # never called
    """Embed texts, from the cache where possible.

    Headers: `x-priority: interactive|bulk`, `x-request-timeout-ms`, `x-request-id`, `cache-control: no-cache`
    (compute anew, and store).
    """
