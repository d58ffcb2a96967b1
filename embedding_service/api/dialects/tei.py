"""The dialect of text-embeddings-inference (TEI): `POST /embed` with `inputs`, `POST /`, and its refusals.

The original is in https://github.com/huggingface/text-embeddings-inference, `router/src/http`. Field names, statuses
and error types are those of its code where its documentation differs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, WithJsonSchema

from embedding_common import native, refusals
from embedding_service.api.dialects import inputs
from embedding_service.api.dialects.dialect import Dialect, Options, Refusals
from embedding_service.errors import EmptyInput, InferenceFailed, InvalidRequest, Problem

if TYPE_CHECKING:
    from embedding_service.api.dialects.dialect import Limits
    from embedding_service.core.catalog import Catalog

_FIELD_NAMES = {"texts": "inputs", "model_id": "model"}  # our name of a field -> its name in TEI's dialect
_POOLING = {"lasttoken": "last_token"}  # the name in sentence-transformers -> the name in TEI; the others are the same

# The native dialect took its error types from TEI, so the table is the same but for these two statuses.
STATUS = refusals.STATUS | {EmptyInput: (400, "Empty"), InferenceFailed: (424, "Backend")}

InputsField = Annotated[
    object, WithJsonSchema({"anyOf": inputs.SCHEMA["anyOf"][:2]}), Field(description="A text, or a list of texts.")
]
ModelField = Annotated[str | None, Field(alias="model", description="Ours. Default: the default model.")]


class TeiEmbedRequest(Options):
    """Their request, and our options beside it. `null` means absent; unknown fields are ignored."""

    inputs: InputsField
    model_id: ModelField = None


def error_body(problem: Problem, request_id: str) -> tuple[int, bytes]:
    """Returns status and JSON of a refusal."""
    return refusals.error_body(problem, request_id, table=STATUS, field_names=_FIELD_NAMES)


def parse(body: bytes, limits: Limits) -> tuple[list[str], TeiEmbedRequest]:
    """Returns the texts, and the request that they came in. Raises `Problem`."""
    request = native.read(TeiEmbedRequest, body)
    texts = texts_of(request.inputs, limits)
    if not limits.accept_empty:
        inputs.refuse_empty(texts, field="inputs")
    return texts, request


def texts_of(given: object, limits: Limits) -> list[str]:
    """Returns the texts of a field `inputs`. Raises `EmptyInput`, `InvalidRequest`."""
    texts, token_lists = inputs.sort_out(
        given, field="inputs", max_texts=limits.max_texts, max_text_bytes=limits.max_text_bytes
    )
    # TEI's ids are those of the served model, OpenAI's are those of cl100k. A list of ids does not show which it
    # means, so a mistake would go unseen.
    if token_lists:
        raise InvalidRequest(
            "inputs: must be a string or a list of strings, got token ids", field="inputs", limit="strings"
        )
    native.check_texts(texts, field="inputs", max_texts=limits.max_texts, max_text_bytes=limits.max_text_bytes)
    return texts


def write(items: list[bytes], /, **_: object) -> list[bytes]:
    """Returns the body of a reply in parts: a bare list of vectors, also for one text."""
    parts = [b"["]
    for item in items:
        parts += (item, b",")
    parts[-1] = b"]"
    return parts


REFUSALS = Refusals(
    error_body=error_body, reply=refusals.ErrorReply, statuses=tuple(status for status, _ in STATUS.values())
)

TEI = Dialect(name="TEI", texts_field="inputs", parse=parse, write=write, refusals=REFUSALS)

EXAMPLES: dict[str, dict[str, object]] = {
    "tei": {"inputs": "hello world"},
    "tei_list": {"inputs": ["hello world", ""], "truncate": True, "normalize": False},
}


def info(catalog: Catalog, *, max_texts: int, calls: int, auto_truncate: bool) -> dict[str, Any]:
    """Returns the fields of `/info` that TEI has; null for what the gateway does not know of its replicas."""
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
