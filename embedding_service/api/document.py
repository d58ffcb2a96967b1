"""The OpenAPI document of the routes that `asgi.Edge` answers itself: bodies, examples that run, refusals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Body

from embedding_common import native

# FastAPI reads the annotations of the functions below
from embedding_service.api.dialects import openai, tei
from embedding_service.api.dialects.native import NativeEmbedRequest  # noqa: TC001
from embedding_service.api.dialects.openai import EmbeddingsReply, EmbeddingsRequest  # noqa: TC001
from embedding_service.api.dialects.tei import TeiEmbedRequest, Token, TokenizeRequest  # noqa: TC001
from embedding_service.api.dialects.weaviate import VectorsReply, VectorsRequest  # noqa: TC001

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi import FastAPI
    from pydantic import BaseModel

_HEADERS = """
Request headers: `x-priority: interactive|bulk`, `x-request-timeout-ms`, `x-request-id`, `x-cache-ttl` (seconds),
`cache-control: no-cache` (compute anew, and store). Reply headers: `x-request-id`, `x-cache: hit=n;miss=n`, `x-tokens`,
`x-truncated`, `x-model-fingerprint`, `server-timing`.
"""


_FRAMEWORKS = "HTTPValidationError"


def document(app: FastAPI) -> None:
    """Adds them; what is added is never called."""
    native_or_tei = _refusals(native.STATUS, native.ErrorReply) | _refusals(tei.STATUS, native.ErrorReply)
    openais = _refusals(openai.STATUS, openai.ErrorReply)
    for path in ("/embed", "/"):
        app.add_api_route(path, _embed, methods=["POST"], responses=native_or_tei, tags=["embed"])
    for path in ("/v1/embeddings", "/embeddings"):
        app.add_api_route(path, _embeddings, methods=["POST"], responses=openais, tags=["OpenAI"])
    teis = _refusals(tei.STATUS, native.ErrorReply)
    app.add_api_route("/tokenize", _tokenize, methods=["POST"], responses=teis, tags=["TEI"])
    natives = _refusals(native.STATUS, native.ErrorReply)
    app.add_api_route("/vectors", _vectors, methods=["POST"], responses=natives, tags=["Weaviate"])
    written = app.openapi
    app.openapi = lambda: _without_the_frameworks_own(written())  # type: ignore[method-assign]  # FastAPI's own advice


def _without_the_frameworks_own(document: dict[str, Any]) -> dict[str, Any]:
    """Takes out the refusal that the framework adds to every route with a body or a parameter, and never sends here."""
    for route in (route for path in document["paths"].values() for route in path.values()):
        refusal = route["responses"].get("422")
        if refusal is not None and _FRAMEWORKS in str(refusal):
            del route["responses"]["422"]
    for name in (_FRAMEWORKS, "ValidationError"):
        document["components"]["schemas"].pop(name, None)
    return document


def _refusals(table: Mapping[Any, tuple[Any, ...]], shape: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    return {row[0]: {"model": shape} for row in table.values()}


def _examples(**bodies: dict[str, Any]) -> Any:
    return Body(openapi_examples={name: {"value": body} for name, body in bodies.items()})


def _embed(  # type: ignore[empty-body]
    body: Annotated[
        NativeEmbedRequest | TeiEmbedRequest,
        _examples(
            native={"texts": ["hello world", "second text"]},
            native_shorter={"texts": ["hello world"], "dimensions": 2, "encoding_format": "base64"},
            native_query={"texts": ["hello world"], "input_type": "query", "cache_ttl_seconds": 60},
            tei={"inputs": "hello world"},
            tei_list={"inputs": ["hello world", ""], "truncate": True, "normalize": False},
        ),
    ],
) -> native.EmbedReply | list[list[float]]:
    """Embed texts, from the cache where possible: `texts` are answered with an object, `inputs` as TEI does."""


def _embeddings(  # type: ignore[empty-body]
    body: Annotated[
        EmbeddingsRequest,
        _examples(
            text={"input": "hello world", "model": "text-embedding-3-small"},
            texts={"input": ["hello world", "second text"], "encoding_format": "base64", "dimensions": 2},
            token_ids={"input": [[15339, 1917], [65]], "model": "text-embedding-3-small"},
        ),
    ],
) -> EmbeddingsReply:
    """Embed texts as OpenAI does. Token ids are those of cl100k_base, and are embedded as the text they stand for."""


def _tokenize(  # type: ignore[empty-body]
    body: Annotated[TokenizeRequest, _examples(texts={"inputs": ["hello world"], "add_special_tokens": True})],
) -> list[list[Token]]:
    """The served model's own tokens, as TEI gives them."""


def _vectors(  # type: ignore[empty-body]
    body: Annotated[
        VectorsRequest,
        _examples(
            text={"text": "hello world", "config": {"task_type": "query"}},
            shorter={"text": "hello world", "config": {"dimensions": 2}},
        ),
    ],
) -> VectorsReply:
    """Embed one text as Weaviate's text2vec-transformers asks for it."""


for _route in (_embed, _embeddings, _vectors):
    _route.__doc__ = (_route.__doc__ or "") + "\n" + _HEADERS
