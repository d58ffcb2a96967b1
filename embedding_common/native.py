"""The native dialect of `POST /embed`: its schemas, how a body is read and how a reply is written.

The gateway and every replica speak it. All functions here are pure: they take bytes and return objects, or the other
way round, and each caller passes its own limits. What a refusal says stands in `refusals`, how a vector is encoded
stands in `encoding`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal, Protocol, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from embedding_common import errors, refusals

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_DIMENSIONS = 1 << 20
"""The largest value that `dimensions` may have. No model has as many components; without a limit the refusal would
repeat a number of any length."""

MAX_CONTAINERS = 1 << 16
"""The most lists and objects that a body may hold. Lists of token ids need the most: one for each text."""
# The closing quote is optional and the quantifiers are possessive: a body that ends within a string is read once,
# not once for each quote.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)

MAX_TOKENIZE_BYTES = 1 << 18
"""The most bytes of text that one request may have tokenized. The description of a token takes a hundred times its
bytes: 8 MB of text held a gateway's event loop for 8 s, and took 2.4 GB there and 1.2 GB at the replica."""


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
        # Without `fail_fast`, 32 MiB of numbers would make one error each: gigabytes, of which only the first is told.
        Field(min_length=1, fail_fast=True, description="One vector is returned for each, in this order."),
    ]


class TextLimits(Protocol):
    """The limits of a server on the texts of one request."""

    @property
    def max_texts(self) -> int: ...
    @property
    def max_text_bytes(self) -> int: ...


R = TypeVar("R", bound=BaseModel)
E = TypeVar("E", bound=EmbedRequest)


class EmbedReply(BaseModel):
    """Vectors in the order of the texts."""

    embeddings: Annotated[list[list[float]] | list[str], Field(description="Strings if base64 was asked for.")]
    dimension: int
    model: str
    processing_time_ms: float
    cached_count: Annotated[int, Field(description="Texts answered by a cache, or by a computation under way.")]
    edition: str
    batch_size: int


def parse(kind: type[E], body: bytes, limits: TextLimits) -> tuple[list[str], E]:
    """Returns the texts in `body`, and the request of type `kind` that they came in.

    Raises `MalformedBody`, `InvalidRequest` or `BodyTooLarge`.
    """
    request = read(kind, body)
    check_texts(request.texts, field="texts", max_texts=limits.max_texts, max_text_bytes=limits.max_text_bytes)
    return request.texts, request


def read(kind: type[R], body: bytes) -> R:
    """Returns the `kind` that `body` holds as JSON. Raises `MalformedBody`, `InvalidRequest` or `BodyTooLarge`."""
    check_crowd(body)
    try:
        return kind.model_validate_json(body)
    except ValidationError as invalid:
        raise refusals.translate(invalid) from None


def check_crowd(body: bytes) -> None:
    """Raises `BodyTooLarge` if a body holds more lists and objects than any request needs.

    A body of 32 MiB can hold eleven million of them, and the parser makes each one before the first field is looked
    at: that takes a gigabyte, and for a second no other caller is answered. Brackets within strings do not count.
    """
    if len(body) <= MAX_CONTAINERS or body.count(b"[") + body.count(b"{") <= MAX_CONTAINERS:
        return
    without_strings = _STRING.sub(b"", body)
    if (count := without_strings.count(b"[") + without_strings.count(b"{")) > MAX_CONTAINERS:
        raise errors.BodyTooLarge(
            f"body: at most {MAX_CONTAINERS} lists and objects, got {count}",
            field="body",
            limit=MAX_CONTAINERS,
            value=count,
        )


def check_texts(texts: Sequence[str], *, field: str, max_texts: int, max_text_bytes: int) -> None:
    """Raises `InvalidRequest` if there are too many texts, or one of them is too long."""
    if len(texts) > max_texts:
        raise errors.InvalidRequest(
            f"{field}: at most {max_texts} texts, got {len(texts)}", field=field, limit=max_texts, value=len(texts)
        )
    # A character takes at most four bytes in UTF-8, so short texts need not be encoded to be measured.
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
    """Raises `BodyTooLarge` if the texts have more bytes together than one request may have tokenized."""
    size = sum(len(text.encode()) for text in texts)
    if size > MAX_TOKENIZE_BYTES:
        raise errors.BodyTooLarge(
            f"{field}: at most {MAX_TOKENIZE_BYTES} bytes are tokenized at once, got {size}",
            field=field,
            limit=MAX_TOKENIZE_BYTES,
            value=size,
        )


def write_reply(
    rows: Sequence[bytes],
    *,
    texts: Sequence[str],
    model: str,
    dimension: int,
    took_s: float,
    cached: int,
    edition: str,
    tokens: int = 0,  # noqa: ARG001 - other dialects tell it
) -> list[bytes]:
    """Returns the body of an `EmbedReply` in parts around the encoded rows, so that no vector passes through a dict."""
    tail = orjson.dumps(
        {
            "dimension": dimension,
            "model": model,
            "processing_time_ms": round(took_s * 1000, 3),
            "cached_count": cached,
            "edition": edition,
            "batch_size": len(texts),
        }
    )
    parts = [b'{"embeddings":[']
    for row in rows:
        parts += (row, b",")
    parts[-1] = b"]," + tail[1:]
    return parts
