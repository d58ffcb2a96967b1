"""OpenAI's dialect: `POST /v1/embeddings` (also without `/v1`), `GET /v1/models`, and its error object.

The specification is `CreateEmbeddingRequest` of https://github.com/openai/openai-openapi.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import orjson
from pydantic import BaseModel, Field, WithJsonSchema

from embedding_common import native, refusals
from embedding_service.api.dialects import cl100k, inputs
from embedding_service.api.dialects.dialect import Dialect, Options, Refusals
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
    from collections.abc import Sequence

    from embedding_service.api.dialects.dialect import Limits, TokenLists
    from embedding_service.core.catalog import Catalog

_FIELD_NAMES = {"texts": "input", "model_id": "model"}  # our name of a field -> its name in OpenAI's dialect

# (status, type, code). Clients raise by status. LangChain.js repeats 422 and 424, so this table has neither.
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
    created: Annotated[int, Field(description="0: not recorded.")]
    owned_by: str


class ModelsReply(BaseModel):
    object: Literal["list"]
    data: list[Model]


def error_body(problem: Problem, request_id: str) -> tuple[int, bytes]:  # noqa: ARG001 - only the header tells the id
    """Returns status and JSON of a refusal."""
    status, kind, code = STATUS[type(problem)]
    message, param = refusals.rename_field(problem, _FIELD_NAMES)
    return status, orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}})


def parse(body: bytes, limits: Limits) -> tuple[list[str] | TokenLists, EmbeddingsRequest]:
    """Returns texts or lists of token ids, and the request that they came in. Raises `Problem`."""
    request = native.read(EmbeddingsRequest, body)
    texts, token_lists = inputs.sort_out(
        request.input, field="input", max_texts=limits.max_openai_inputs, max_text_bytes=limits.max_text_bytes
    )
    if token_lists:
        return token_lists, request
    _check(texts, limits)
    return texts, request


async def decode(token_lists: TokenLists, limits: Limits) -> list[str]:
    """Returns the texts that lists of token ids stand for. Raises `Problem`."""
    texts = await cl100k.decode(token_lists, field="input")
    _check(texts, limits)
    return texts


def _check(texts: Sequence[str], limits: Limits) -> None:
    if not limits.accept_empty:
        inputs.refuse_empty(texts, field="input")
    native.check_texts(texts, field="input", max_texts=limits.max_openai_inputs, max_text_bytes=limits.max_text_bytes)


def write_items(vectors: list[bytes], start: int) -> list[bytes]:
    """Returns the items of `data` for the vectors of the texts from place `start` on."""
    return [
        b'{"object":"embedding","index":%d,"embedding":%b}' % (index, vector)
        for index, vector in enumerate(vectors, start)
    ]


def write(items: list[bytes], /, *, model: str, tokens: int, **_: object) -> list[bytes]:
    """Returns the body of a reply in parts."""
    tail = orjson.dumps({"model": model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})
    parts = [b'{"object":"list","data":[']
    for item in items:
        parts += (item, b",")
    parts[-1] = b"]," + tail[1:]
    return parts


REFUSALS = Refusals(error_body=error_body, reply=ErrorReply, statuses=tuple(status for status, _, _ in STATUS.values()))

OPENAI = Dialect(
    name="OpenAI",
    texts_field="input",
    parse=parse,
    decode=decode,
    write_items=write_items,
    write=write,
    refusals=REFUSALS,
)

EXAMPLES: dict[str, dict[str, object]] = {
    "text": {"input": "hello world", "model": "text-embedding-3-small"},
    "texts": {"input": ["hello world", "second text"], "encoding_format": "base64", "dimensions": 2},
    "token_ids": {"input": [[15339, 1917], [65]], "model": "text-embedding-3-small"},
}


def models(catalog: Catalog) -> ModelsReply:
    """Returns every name that a request may use: those of the models, the default first, then the aliases."""
    return ModelsReply(object="list", data=[_model(name) for name in (*catalog.states, *catalog.aliases)])


def model(catalog: Catalog, name: str) -> Model:
    """Returns the entry of one name. Raises `UnknownModel`, `Unavailable`."""
    catalog.card(name)
    return _model(name)


def _model(name: str) -> Model:
    return Model(id=name, object="model", created=0, owned_by="embedding-service")
