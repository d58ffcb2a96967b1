"""`POST /embed` with `texts`: the native dialect. Bytes to an Ask, an Answer to bytes."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from embedding_service.ask import Ask
from embedding_service.singleflight import NEVER
from ml_base import asgi, native
from ml_base.wire import FINGERPRINT_HEADER, PRIORITY_HEADER, TIMEOUT_HEADER, choose_lane, parse_timeout_s

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.types import Receive, Scope, Send

    from embedding_service.ask import Answer
    from embedding_service.catalog import Catalog
    from embedding_service.embedder import Embedder
    from embedding_service.vectors import Renderer


_FINGERPRINT = FINGERPRINT_HEADER.encode()
_PRIORITY = PRIORITY_HEADER.encode()
_TIMEOUT = TIMEOUT_HEADER.encode()


class NativeDialect:
    """The endpoint, with the limits it checks."""

    def __init__(
        self,
        *,
        embedder: Embedder,
        catalog: Catalog,
        renderer: Renderer,
        max_texts: int,
        max_text_bytes: int,
        max_body_bytes: int,
        edition: str,
    ) -> None:
        self._embedder = embedder
        self._catalog = catalog
        self._renderer = renderer
        self._max_texts = max_texts
        self._max_text_bytes = max_text_bytes
        self._max_body_bytes = max_body_bytes
        self._edition = edition

    async def embed(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`POST /embed`: bytes to an Ask, an Answer to bytes."""
        started = time.perf_counter()
        body = await asgi.read_body(scope, receive, limit_bytes=self._max_body_bytes)
        request = native.parse(body, max_texts=self._max_texts, max_text_bytes=self._max_text_bytes)
        if request.dimensions is not None:
            native.check_dimensions(request.dimensions, self._catalog.card(request.model_id))
        answer = await self._embedder.embed(_ask(scope, receive, request))
        if request.truncate is False:
            _refuse_truncated(answer)
        await self._reply(send, request, answer, started)

    async def _reply(self, send: Send, request: native.EmbedRequest, answer: Answer, started: float) -> None:
        texts = len(answer.entries)
        rows = []
        for chunk in self._renderer.rows(
            answer.entries,
            dimensions=request.dimensions,
            normalize=request.normalize is not False,
            encoding_format=request.encoding_format,
        ):
            rows.append(chunk)
            if texts > native.ROWS_PER_CHUNK:
                await asyncio.sleep(0)  # others' cached answers go out between the chunks of a large one
        parts = native.assemble_reply(
            rows,
            dimension=request.dimensions or answer.card.dimension,
            texts=texts,
            model=answer.card.id,
            took_s=time.perf_counter() - started,
            cached=answer.cached_count(),
            edition=self._edition,
        )
        await asgi.send_bytes(send, 200, parts, headers=[(_FINGERPRINT, answer.card.fingerprint.encode())])


def _ask(scope: Scope, receive: Receive, request: native.EmbedRequest) -> Ask:
    headers = dict(scope["headers"])
    timeout_s = parse_timeout_s(_text(headers.get(_TIMEOUT)))
    return Ask(
        texts=request.texts,
        lane=choose_lane(_text(headers.get(_PRIORITY)), len(request.texts)),
        request_id=scope["state"]["request_id"],
        model_id=request.model_id,
        prompt_name=request.prompt_name,
        direction=request.truncation_direction or "right",
        deadline=NEVER if timeout_s is None else time.monotonic() + timeout_s,
        ttl_s=request.cache_ttl_seconds,
        bypass=b"no-cache" in headers.get(b"cache-control", b""),
        caller_gone=partial(asgi.disconnected, receive),
    )


def _text(header: bytes | None) -> str | None:
    return None if header is None else header.decode("latin-1")


def _refuse_truncated(answer: Answer) -> None:
    for index, entry in enumerate(answer.entries):
        if entry.truncated:
            raise native.refuse_truncated(index, entry.tokens, answer.card)


def document(app: FastAPI) -> None:
    """Puts `POST /embed` into the OpenAPI document; `asgi.Edge` answers it."""
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": native.ErrorReply} for status, _ in native.STATUS.values()
    }
    app.add_api_route("/embed", _documented, methods=["POST"], responses=refusals, tags=["embed"])


def _documented(body: native.EmbedRequest) -> native.EmbedReply:  # type: ignore[empty-body]  # never called
    """Embed texts, from the cache where possible.

    Headers: `x-priority: interactive|bulk`, `x-request-timeout-ms`, `x-request-id`, `cache-control: no-cache`
    (compute anew, and store).
    """
