"""Who answers a POST, and in whose words it is refused. `edge.Edge` sends these paths here, past the framework."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic_core import from_json

from embedding_common import native
from embedding_common.http import edge
from embedding_service.api.dialects import openai, tei
from embedding_service.errors import MalformedBody

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.types import ASGIApp, Receive, Scope, Send

    from embedding_common.http.edge import ErrorBody
    from embedding_service.api.dialects.native import NativeDialect
    from embedding_service.api.dialects.openai import OpenAIDialect
    from embedding_service.api.dialects.tei import TeiDialect
    from embedding_service.api.dialects.weaviate import WeaviateDialect
    from embedding_service.api.serving import Exchange, Serving

# the field that holds the texts tells whose request it is
_NATIVE, _TEI, _OPENAI = "texts", "inputs", "input"
_OF_OTHERS = b'"input'
"""Begins both other fields. Within a string JSON escapes the quote, so most native bodies lack it, and are not looked
into twice."""


def words(scope: Scope) -> ErrorBody:
    """The refusals of the dialect that a request speaks: as its body told, else as its path does."""
    known: ErrorBody | None = scope["state"].get("words")
    if known is not None:
        return known
    path = scope["path"]
    if path.startswith("/v1/") or path in {"/v1", "/embeddings"}:
        return openai.error_body
    return tei.error_body if path == "/tokenize" else native.error_body


class Dialects:
    """The endpoints by path."""

    def __init__(
        self,
        serving: Serving,
        *,
        native: NativeDialect,
        openai: OpenAIDialect,
        tei: TeiDialect,
        weaviate: WeaviateDialect,
    ) -> None:
        self._serving = serving
        self._native = native
        self._openai = openai
        self._tei = tei
        self._weaviate = weaviate

    def routes(self) -> dict[str, ASGIApp]:
        """ASGI apps that answer every problem themselves."""
        endpoints = {
            "/": self._by_body,  # Hugging Face's clients post to the URL as it was given
            "/embed": self._by_body,
            "/embeddings": self._openai.embed,  # a base URL without /v1
            "/v1/embeddings": self._openai.embed,
            "/tokenize": self._tei.tokenize,
            "/vectors": self._weaviate.embed,
        }
        return {path: edge.guarded(self._endpoint(answer), words=words) for path, answer in endpoints.items()}

    def _endpoint(
        self, answer: Callable[[Exchange], Awaitable[None]]
    ) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
        serving = self._serving

        async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await answer(await serving.receive(scope, receive, send))
            finally:
                serving.let_go(scope)

        return endpoint

    async def _by_body(self, exchange: Exchange) -> None:
        spoken = _NATIVE if _OF_OTHERS not in exchange.body else _tell_apart(exchange.body)
        if spoken == _TEI:
            exchange.scope["state"]["words"] = tei.error_body
            await self._tei.embed(exchange)
        elif spoken == _OPENAI:
            exchange.scope["state"]["words"] = openai.error_body
            await self._openai.embed(exchange)
        else:
            await self._native.embed(exchange)


def _tell_apart(body: bytes) -> str:
    """The one of the three fields that is there; what is no object is left to the native dialect to refuse."""
    try:
        fields = from_json(body)  # takes what the dialects' own parser takes, NaN for one
    except ValueError:
        return _NATIVE
    if not isinstance(fields, dict):
        return _NATIVE
    named = [name for name in (_NATIVE, _TEI, _OPENAI) if name in fields]
    present = [name for name in named if fields[name] is not None]
    if len(present) > 1:
        raise MalformedBody(
            f"body: one of {_NATIVE} (native), {_TEI} (TEI) and {_OPENAI} (OpenAI), got {' and '.join(present)}",
            field="body",
            limit=f"{_NATIVE}|{_TEI}|{_OPENAI}",
            value=" and ".join(present),
        )
    return (present or named or [_NATIVE])[0]
