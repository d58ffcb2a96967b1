"""The native dialect of `POST /embed`, spoken by the gateway and, uncached, by every replica: parse, shape, reply.

Pure functions on bytes and arrays; no I/O. Whoever speaks it hands in the limits that are its own.
"""

from __future__ import annotations

import re
from binascii import b2a_base64
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import numpy as np
import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from embedding_common import errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from embedding_common.contract import ModelCard

ROWS_PER_CHUNK = 128
"""Vectors written as JSON in one go: 128 x 384 floats take about a millisecond, the longest the loop is held."""


UNIT_TOLERANCE = 1e-5
"""Of a squared norm: some rounding steps of float32 over hundreds of components."""

MAX_DIMENSIONS = 1 << 20  # more than any model has: a number of any length would be echoed in the refusal

MAX_CONTAINERS = 1 << 16  # lists of token ids are the most that anybody sends: one for each text
# The end is optional, and nothing is ever tried twice: bytes that end within a string are read once, not once a quote.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)

MAX_TOKENIZE_BYTES = 1 << 18
"""Of text that is taken apart at once. What is told of a token takes a hundred times its bytes: 8 MB of text held a
gateway's event loop for 8 s, and took 2.4 GB there and 1.2 GB at the replica."""

_QUOTED_CHARS = 24  # an error may quote a word, never a text


class EmbedOptions(BaseModel):
    """How to embed. `null` means absent for every optional field; unknown fields are ignored."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    normalize: Annotated[bool | None, Field(description="Unit length (default), or the model's own output.")] = None
    model_id: Annotated[str | None, Field(description="A model of `/models`; default: the default model.")] = None
    cache_ttl_seconds: Annotated[
        int | None, Field(ge=0, le=10 * 365 * 86400, description="Lifetime of what this request stores; 0: nothing.")
    ] = None
    dimensions: Annotated[int | None, Field(ge=1, le=MAX_DIMENSIONS, description="Keep the first n components.")] = None
    prompt_name: Annotated[str | None, Field(description="One of the model's own prompts.")] = None
    truncate: Annotated[bool | None, Field(description="false: refuse a text over the model's limit.")] = None
    truncation_direction: Annotated[Literal["left", "right"] | None, Field(description="The side cut off.")] = None
    encoding_format: Annotated[
        Literal["float", "base64"] | None, Field(description="base64: little-endian float32, a quarter of the bytes.")
    ] = None


class EmbedRequest(EmbedOptions):
    """Texts to embed. `null` means absent for every optional field; unknown fields are ignored."""

    texts: Annotated[
        list[str],
        # else 32 MiB of numbers would make a complaint about each: gigabytes, to tell of the first
        Field(min_length=1, fail_fast=True, description="One vector is returned for each, in this order."),
    ]


R = TypeVar("R", bound=BaseModel)


class EmbedReply(BaseModel):
    """Vectors in the order of the texts."""

    embeddings: Annotated[list[list[float]] | list[str], Field(description="Strings if base64 was asked for.")]
    dimension: int
    model: str
    processing_time_ms: float
    cached_count: Annotated[int, Field(description="Texts answered by a cache, or by a computation under way.")]
    edition: str
    batch_size: int


class ErrorReply(BaseModel):
    """What every 4xx and 5xx of this dialect looks like."""

    error: str
    error_type: str
    field: str | None = None
    limit: int | float | str | None = None
    value: int | float | str | None = None
    request_id: str | None = None


# (status, error_type); the types are the words text-embeddings-inference uses on this route.
STATUS: dict[type[errors.Problem], tuple[int, str]] = {
    errors.MalformedBody: (400, "Validation"),
    errors.Unauthorized: (401, "Unauthorized"),
    errors.Forbidden: (403, "Forbidden"),
    errors.UnknownPath: (404, "Validation"),
    errors.WrongMethod: (405, "Validation"),
    errors.RequestTimeout: (408, "Timeout"),
    errors.EmptyInput: (422, "Empty"),
    errors.InvalidRequest: (422, "Validation"),
    errors.BodyTooLarge: (413, "Validation"),
    errors.UnknownModel: (404, "Validation"),
    errors.Overloaded: (429, "Overloaded"),
    errors.Unavailable: (503, "Unhealthy"),
    errors.DeadlineExceeded: (504, "Timeout"),
    errors.InferenceFailed: (500, "Backend"),
}


def error_body(
    problem: errors.Problem,
    request_id: str,
    *,
    table: Mapping[type[errors.Problem], tuple[int, str]] = STATUS,
    words: Mapping[str, str] = MappingProxyType({}),
) -> tuple[int, bytes]:
    """Status and JSON of a refusal; a dialect of the same shape brings its own table and words."""
    status, error_type = table[type(problem)]
    message, field = in_words(problem, words)
    reply = ErrorReply(
        error=message,
        error_type=error_type,
        field=field,
        limit=problem.limit,
        value=problem.value,
        request_id=request_id,
    )
    return status, reply.model_dump_json(exclude_none=True).encode()


def in_words(problem: errors.Problem, words: Mapping[str, str]) -> tuple[str, str | None]:
    """Message and field with the field's name as another dialect has it: `texts[3]` may be `input[3]` there."""
    field = problem.field
    root, bracket, rest = (field or "").partition("[")
    if root not in words:
        return problem.message, field
    renamed = words[root] + bracket + rest
    told = problem.message.startswith(f"{field}:")
    return (renamed + problem.message[len(field or "") :] if told else problem.message), renamed


def check_crowd(body: bytes) -> None:
    """Raises `BodyTooLarge` if there are more lists and objects than any request needs.

    A body of 32 MiB may hold eleven million, and each is made before the first field is looked at: a gigabyte, and a
    second in which nobody else is answered. What stands within strings does not count.
    """
    if len(body) <= MAX_CONTAINERS or body.count(b"[") + body.count(b"{") <= MAX_CONTAINERS:
        return
    bare = _STRING.sub(b"", body)
    if (count := bare.count(b"[") + bare.count(b"{")) > MAX_CONTAINERS:
        raise errors.BodyTooLarge(
            f"body: at most {MAX_CONTAINERS} lists and objects, got {count}",
            field="body",
            limit=MAX_CONTAINERS,
            value=count,
        )


def parse(body: bytes, *, max_texts: int, max_text_bytes: int) -> EmbedRequest:
    """The request in `body`. Raises `MalformedBody` or `InvalidRequest`."""
    request = read(EmbedRequest, body)
    check_texts(request.texts, field="texts", max_texts=max_texts, max_text_bytes=max_text_bytes)
    return request


def read(kind: type[R], body: bytes) -> R:
    """A `kind` from its JSON. Raises `MalformedBody` or `InvalidRequest`."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as invalid:
        raise translate(invalid) from None


def check_texts(texts: Sequence[str], *, field: str, max_texts: int, max_text_bytes: int) -> None:
    """Raises `InvalidRequest` if there are too many, or one is too long."""
    if len(texts) > max_texts:
        raise errors.InvalidRequest(
            f"{field}: at most {max_texts} texts, got {len(texts)}", field=field, limit=max_texts, value=len(texts)
        )
    # four bytes is the most UTF-8 takes, so short texts need no encoding to be measured
    if max(map(len, texts), default=0) * 4 <= max_text_bytes:
        return
    for index, text in enumerate(texts):
        if len(text) * 4 > max_text_bytes and (size := len(text.encode())) > max_text_bytes:
            raise errors.InvalidRequest(
                f"{field}[{index}]: at most {max_text_bytes} bytes, got {size}",
                field=f"{field}[{index}]",
                limit=max_text_bytes,
                value=size,
            )


def check_tokenizable(texts: Sequence[str], *, field: str) -> None:
    """Raises `BodyTooLarge` if they are more than can be taken apart at once."""
    size = sum(len(text.encode()) for text in texts)
    if size > MAX_TOKENIZE_BYTES:
        raise errors.BodyTooLarge(
            f"{field}: at most {MAX_TOKENIZE_BYTES} bytes are tokenized at once, got {size}",
            field=field,
            limit=MAX_TOKENIZE_BYTES,
            value=size,
        )


def translate(invalid: ValidationError) -> errors.Problem:
    """The first thing wrong with a body, by field, limit and value."""
    first = invalid.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return errors.MalformedBody(f"body: {first['msg']}", field="body")
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])[1:] or "body"
    limit = next(
        (str(first["ctx"][key]) for key in ("ge", "le", "min_length", "expected") if key in first.get("ctx", {})), None
    )
    value = describe(first["input"]) if first["type"] != "missing" else "nothing"
    message = f"{field}: {first['msg'][0].lower()}{first['msg'][1:]}, got {value}"
    return errors.InvalidRequest(message, field=field, limit=limit, value=value)


def describe(value: Any) -> str:
    """A value for an error message: numbers and flags as they are, of anything longer only its kind and size."""
    if value is None or isinstance(value, bool | int | float):
        return orjson.dumps(value).decode()[:40] if not isinstance(value, int) else str(value)[:40].lower()
    if isinstance(value, str):
        return repr(value) if len(value) <= _QUOTED_CHARS else f"a string of {len(value)} characters"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "an object"


def check_dimensions(dimensions: int | None, card: ModelCard) -> None:
    """Raises `InvalidRequest` if the model has fewer components than asked for."""
    if dimensions is not None and dimensions > card.dimension:
        raise errors.InvalidRequest(
            f"dimensions: {card.id} has {card.dimension}, got {dimensions}",
            field="dimensions",
            limit=card.dimension,
            value=dimensions,
        )


def check_model(model_id: str | None, served: list[str]) -> str:
    """The id of the model that answers. Raises `UnknownModel`."""
    if model_id is None:
        return served[0]
    if model_id not in served:
        known = ", ".join(served)
        raise errors.UnknownModel(
            f"model_id: {model_id[:80]!r} is not served here; available: {known}",
            field="model_id",
            limit=known,
            value=model_id[:80],
        )
    return model_id


def refuse_truncated(index: int, tokens: int, card: ModelCard) -> errors.InvalidRequest:
    """The refusal of a text that `truncate: false` forbids to cut."""
    return errors.InvalidRequest(
        f"texts[{index}]: {tokens} tokens, at most {card.max_tokens} with truncate=false",
        field=f"texts[{index}]",
        limit=card.max_tokens,
        value=tokens,
    )


def shape(vectors: NDArray[np.float32], *, dimensions: int | None, normalize: bool) -> NDArray[np.float32]:
    """Cut [n, d] to the first `dimensions` components, then scale rows to unit length if asked. A zero row stays zero.

    Matryoshka order (arXiv:2205.13147): cutting a normalised vector shortens it, so the norm is taken last. Rows that
    the model itself normalised are left as they are, to the last bit.
    """
    if dimensions is not None and dimensions < vectors.shape[1]:
        vectors = vectors[:, :dimensions]
    if normalize:
        squares = np.einsum("ij,ij->i", vectors, vectors)
        if np.abs(squares - 1).max(initial=0) > UNIT_TOLERANCE:
            norms = np.sqrt(np.maximum(squares, np.float32(1e-24)))
            vectors = vectors / norms[:, None]
    return np.ascontiguousarray(vectors, np.float32)


def encode_row(vector: NDArray[np.float32], encoding_format: str | None) -> bytes:
    """One vector as `encode_rows` writes it."""
    if encoding_format == "base64":
        return b'"%b"' % b2a_base64(vector.astype("<f4", copy=False).data, newline=False)
    return orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY)


def encode_rows(vectors: NDArray[np.float32], encoding_format: str | None) -> Iterator[bytes]:
    """The rows of a reply, comma separated, `ROWS_PER_CHUNK` at a time: a caller may yield to the loop in between.

    JSON numbers, or for "base64" the little-endian float32 bytes in the standard alphabet (RFC 4648), padded.
    """
    for start in range(0, len(vectors), ROWS_PER_CHUNK):
        chunk = vectors[start : start + ROWS_PER_CHUNK]
        if encoding_format == "base64":
            yield b",".join([encode_row(row, encoding_format) for row in chunk])
        else:
            yield orjson.dumps(chunk, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]


def assemble_reply(
    rows: Sequence[bytes], *, dimension: int, texts: int, model: str, took_s: float, cached: int, edition: str
) -> list[bytes]:
    """The body in parts around the encoded rows, so that no vector passes through a dict."""
    tail = orjson.dumps(
        {
            "dimension": dimension,
            "model": model,
            "processing_time_ms": round(took_s * 1000, 3),
            "cached_count": cached,
            "edition": edition,
            "batch_size": texts,
        }
    )
    parts = [b'{"embeddings":[']
    for row in rows:
        parts += (row, b",")
    parts[-1] = b"]," + tail[1:]
    return parts
