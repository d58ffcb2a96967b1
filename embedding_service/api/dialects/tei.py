"""The dialect of text-embeddings-inference: `POST /embed` with `inputs`, `POST /`, `POST /tokenize`, its refusals.

Theirs: https://github.com/huggingface/text-embeddings-inference, `router/src/http`. The same field names, statuses and
error types, as their code has them where their documentation says otherwise.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import orjson
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from embedding_common import native
from embedding_common.http import edge
from embedding_service.api.dialects import inputs
from embedding_service.api.serving import Options
from embedding_service.errors import EmptyInput, InferenceFailed, InvalidRequest, Problem

if TYPE_CHECKING:
    from embedding_common.contract import TokenizedText
    from embedding_service.api.serving import Exchange, Serving
    from embedding_service.core.catalog import Catalog
    from embedding_service.core.query import Answer
    from embedding_service.upstream.calls import Replicas

_WORDS = {"texts": "inputs", "model_id": "model"}
_POOLING = {"lasttoken": "last_token"}  # sentence-transformers' word -> theirs; the others are the same

# As in the native dialect, whose error types are TEI's; these statuses are not.
STATUS = native.STATUS | {EmptyInput: (400, "Empty"), InferenceFailed: (424, "Backend")}


class TeiEmbedRequest(Options):
    """Their request, and our options beside it. `null` means absent; unknown fields are ignored."""

    inputs: Annotated[
        object, WithJsonSchema({"anyOf": inputs.SCHEMA["anyOf"][:2]}), Field(description="A text, or a list of texts.")
    ]
    model_id: Annotated[str | None, Field(alias="model", description="Ours. Default: the default model.")] = None


class TokenizeRequest(BaseModel):
    """`null` means absent; unknown fields are ignored."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    inputs: Annotated[
        object, WithJsonSchema({"anyOf": inputs.SCHEMA["anyOf"][:2]}), Field(description="A text, or a list of texts.")
    ]
    add_special_tokens: bool | None = None
    prompt_name: str | None = None
    model_id: Annotated[str | None, Field(alias="model", description="Ours. Default: the default model.")] = None


class Token(BaseModel):
    """`start` and `stop` count characters; `null` for tokens that stand for no text."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


def error_body(problem: Problem, request_id: str) -> tuple[int, bytes]:
    """Status and JSON of a refusal."""
    return native.error_body(problem, request_id, table=STATUS, words=_WORDS)


class TeiDialect:
    """Answers as TEI does: a bare list of vectors, also for one text."""

    def __init__(self, serving: Serving, *, catalog: Catalog, replicas: Replicas, accept_empty: bool) -> None:
        self._serving = serving
        self._catalog = catalog
        self._replicas = replicas
        self._accept_empty = accept_empty

    async def embed(self, exchange: Exchange) -> None:
        """Raises `Problem`."""
        request = native.read(TeiEmbedRequest, exchange.body)
        texts = self._texts(request.inputs)
        if not self._accept_empty:
            inputs.refuse_empty(texts, field="inputs")
        await self._serving.reply(exchange, texts, request, self)

    async def tokenize(self, exchange: Exchange) -> None:
        """Tokens by the served model's own tokenizer, at a replica. Raises `Problem`."""
        request = native.read(TokenizeRequest, exchange.body)
        texts = self._texts(request.inputs)
        native.check_tokenizable(texts, field="inputs")
        card = await self._catalog.learn(request.model_id)
        prompt = card.prompt(request.prompt_name)
        body = {
            "texts": texts,
            "model_id": card.id,
            "prompt_name": request.prompt_name,
            "add_special_tokens": request.add_special_tokens is not False,
        }
        tokenized = await self._replicas.tokenize(body, exchange.scope["state"]["request_id"])
        if len(tokenized.texts) != len(texts):
            raise InferenceFailed(f"a replica tokenized {len(tokenized.texts)} texts of {len(texts)}")
        reply = [_tokens(prompt + text, item) for text, item in zip(texts, tokenized.texts, strict=True)]
        took_ms = (time.perf_counter() - exchange.started) * 1e3
        headers = [(b"server-timing", b"tokenize;dur=%.3f" % took_ms)]
        await edge.send_bytes(exchange.send, 200, [orjson.dumps(reply)], headers=headers)

    def items(self, rows: list[bytes], start: int) -> list[bytes]:  # noqa: ARG002 - every row is alike here
        return rows

    def frame(
        self,
        chunks: list[bytes],
        answer: Answer,  # noqa: ARG002 - a bare list tells nothing but vectors
        options: TeiEmbedRequest,  # noqa: ARG002 - what was asked for shows in the vectors
        took_s: float,  # noqa: ARG002 - in the header
    ) -> list[bytes]:
        parts = [b"["]
        for chunk in chunks:
            parts += (chunk, b",")
        parts[-1] = b"]"
        return parts

    def _texts(self, given: object) -> list[str]:
        serving = self._serving
        texts, lists = inputs.sort_out(
            given, field="inputs", max_texts=serving.max_texts, max_text_bytes=serving.max_text_bytes
        )
        if lists:  # TEI means the served model's own ids, as OpenAI means cl100k's: nobody could tell a mistake
            raise InvalidRequest(
                "inputs: must be a string or a list of strings, got token ids", field="inputs", limit="strings"
            )
        native.check_texts(texts, field="inputs", max_texts=serving.max_texts, max_text_bytes=serving.max_text_bytes)
        return texts


def _tokens(text: str, tokenized: TokenizedText) -> list[dict[str, Any]]:
    """TEI gives the source text of a token, and for special ones, which have none, their name."""
    rows = zip(tokenized.ids, tokenized.tokens, tokenized.offsets, tokenized.special, strict=True)
    return [
        {
            "id": token_id,
            "text": token if offsets is None else text[offsets[0] : offsets[1]],
            "special": special,
            "start": offsets and offsets[0],
            "stop": offsets and offsets[1],
        }
        for token_id, token, offsets, special in rows
    ]


def info(catalog: Catalog, *, max_texts: int, calls: int, auto_truncate: bool) -> dict[str, Any]:
    """TEI's part of `/info`; null for what the gateway does not know of its replicas."""
    card = catalog.current
    pooling = card and (_POOLING.get(card.pooling, card.pooling) or None)
    return {
        "model_id": card and card.id,
        "model_sha": None,
        "model_dtype": card and card.dtype,
        "served_model_name": card and card.id,
        "model_type": {"embedding": {"pooling": pooling}},
        "max_concurrent_requests": calls,
        "max_input_length": card and card.max_tokens,
        "max_batch_tokens": None,
        "max_batch_requests": None,
        "max_client_batch_size": max_texts,
        "auto_truncate": auto_truncate,
        "tokenization_workers": None,
        "sha": None,
        "docker_label": None,
    }
