"""OpenAI's dialect: `POST /v1/embeddings` (also without `/v1`), `GET /v1/models`, and its error object.

Their specification: https://github.com/openai/openai-openapi, `CreateEmbeddingRequest`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import orjson
from pydantic import BaseModel, Field, WithJsonSchema

from embedding_common import native
from embedding_service.api.dialects import cl100k, inputs
from embedding_service.api.serving import Options
from embedding_service.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    EmptyInput,
    Forbidden,
    InferenceFailed,
    InvalidRequest,
    MalformedBody,
    Overloaded,
    Problem,
    RequestTimeout,
    Unauthorized,
    Unavailable,
    UnknownModel,
    UnknownPath,
    WrongMethod,
)

if TYPE_CHECKING:
    from embedding_service.api.serving import Exchange, Serving
    from embedding_service.core.catalog import Catalog
    from embedding_service.core.query import Answer

_WORDS = {"texts": "input", "model_id": "model"}  # the path's name of a field -> theirs

# (status, type, code). Clients raise by status; LangChain.js repeats 422 and 424, so those are none of ours.
STATUS: dict[type[Problem], tuple[int, str, str | None]] = {
    MalformedBody: (400, "invalid_request_error", None),
    EmptyInput: (400, "invalid_request_error", None),
    InvalidRequest: (400, "invalid_request_error", None),
    Unauthorized: (401, "authentication_error", "invalid_api_key"),
    Forbidden: (403, "invalid_request_error", "forbidden"),
    UnknownModel: (404, "invalid_request_error", "model_not_found"),
    UnknownPath: (404, "invalid_request_error", "unknown_url"),
    WrongMethod: (405, "invalid_request_error", "method_not_supported"),
    RequestTimeout: (408, "invalid_request_error", "request_timeout"),
    BodyTooLarge: (413, "invalid_request_error", "request_too_large"),
    Overloaded: (429, "rate_limit_exceeded", "rate_limit_exceeded"),
    InferenceFailed: (500, "server_error", None),
    Unavailable: (503, "server_error", "service_unavailable"),
    DeadlineExceeded: (504, "server_error", "timeout"),
}


class EmbeddingsRequest(Options):
    """Their request, and our options beside it. `null` means absent; unknown fields are ignored."""

    input: Annotated[object, WithJsonSchema(inputs.SCHEMA), Field(description="Texts, or token ids of cl100k_base.")]
    model_id: Annotated[str | None, Field(alias="model", description="Default: the default model.")] = None
    user: Annotated[str | None, Field(description="Ignored.")] = None


class Embedding(BaseModel):
    object: Literal["embedding"]
    index: Annotated[int, Field(description="The place of its text in `input`.")]
    embedding: Annotated[list[float] | str, Field(description="A string if base64 was asked for.")]


class Usage(BaseModel):
    prompt_tokens: Annotated[int, Field(description="Read by the model, cached or not; after truncation.")]
    total_tokens: int


class EmbeddingsReply(BaseModel):
    """Vectors in the order of the texts."""

    object: Literal["list"]
    data: list[Embedding]
    model: Annotated[str, Field(description="The model that answered, whatever name it was asked by.")]
    usage: Usage


class ErrorObject(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """What every 4xx and 5xx under `/v1` looks like."""

    error: ErrorObject


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: Annotated[int, Field(description="0: nobody has noted it.")]
    owned_by: str


class ModelsReply(BaseModel):
    object: Literal["list"]
    data: list[Model]


def error_body(problem: Problem, request_id: str) -> tuple[int, bytes]:  # noqa: ARG001 - theirs is in the header alone
    """Status and JSON of a refusal."""
    status, kind, code = STATUS[type(problem)]
    message, param = native.in_words(problem, _WORDS)
    return status, orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})


class OpenAIDialect:
    """Answers as OpenAI does, from the models that are served here."""

    def __init__(self, serving: Serving, *, max_inputs: int, accept_empty: bool) -> None:
        self._serving = serving
        self._max_inputs = max_inputs
        self._accept_empty = accept_empty

    async def embed(self, exchange: Exchange) -> None:
        """Raises `Problem`."""
        request = native.read(EmbeddingsRequest, exchange.body)
        texts, lists = inputs.sort_out(
            request.input, field="input", max_texts=self._max_inputs, max_text_bytes=self._serving.max_text_bytes
        )
        if lists:
            texts = await cl100k.decode(lists, field="input")
        if not self._accept_empty:
            inputs.refuse_empty(texts, field="input")
        native.check_texts(
            texts, field="input", max_texts=self._max_inputs, max_text_bytes=self._serving.max_text_bytes
        )
        await self._serving.reply(exchange, texts, request, self)

    def items(self, rows: list[bytes], start: int) -> list[bytes]:
        return [
            b'{"object":"embedding","index":%d,"embedding":%b}' % (index, row) for index, row in enumerate(rows, start)
        ]

    def frame(
        self,
        chunks: list[bytes],
        answer: Answer,
        options: EmbeddingsRequest,  # noqa: ARG002 - what was asked for shows in the vectors
        took_s: float,  # noqa: ARG002 - in the header
    ) -> list[bytes]:
        usage = {"prompt_tokens": answer.tokens, "total_tokens": answer.tokens}
        tail = orjson.dumps({"model": answer.card.id, "usage": usage})
        parts = [b'{"object":"list","data":[']
        for chunk in chunks:
            parts += (chunk, b",")
        parts[-1] = b"]," + tail[1:]
        return parts


def models(catalog: Catalog) -> ModelsReply:
    """Every name a request may say: the models' own, the default first, then aliases."""
    return ModelsReply(object="list", data=[_model(name) for name in (*catalog.states, *catalog.aliases)])


def model(catalog: Catalog, name: str) -> Model:
    """One of them. Raises `UnknownModel`, `Unavailable`."""
    catalog.card(name)
    return _model(name)


def _model(name: str) -> Model:
    return Model(id=name, object="model", created=0, owned_by="embedding-service")
