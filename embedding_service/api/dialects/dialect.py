"""What a dialect is: it reads texts and options from a body, writes a reply around encoded vectors, and has refusals.

`serving.Serving` calls these functions; they do no I/O and know nothing of a cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, Protocol, TypeAlias

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import from_json

from embedding_common import native
from embedding_service.errors import MalformedBody

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from embedding_common.contract import ModelCard
    from embedding_common.http.edge import ErrorBody

    TokenLists: TypeAlias = list[list[int]]
    Parse: TypeAlias = Callable[[bytes, "Limits"], tuple[Sequence[str] | TokenLists, "Options"]]
    Decode: TypeAlias = Callable[[TokenLists, "Limits"], Awaitable[list[str]]]
    WriteItems: TypeAlias = Callable[[list[bytes], int], list[bytes]]

# what is embedded -> the names that models give to their prompt for it; some clients call a document "passage"
_PROMPTS_FOR = {
    "query": ("query", "search_query"),
    "document": ("document", "passage", "search_document"),
    "passage": ("passage", "document", "search_document"),
}


class Options(native.EmbedOptions):
    """How to embed, in every dialect. `null` means absent; unknown fields are ignored."""

    input_type: Annotated[
        Literal["query", "document", "passage"] | None,
        Field(description="Takes the model's prompt for it, if it has one; `prompt_name` goes first."),
    ] = None

    def prompt(self, card: ModelCard) -> str | None:
        """Returns the name of the model's prompt that this request asks for, or None."""
        if self.prompt_name is not None or self.input_type is None:
            return self.prompt_name
        return next((name for name in _PROMPTS_FOR[self.input_type] if name in card.prompts), None)


class Fields(BaseModel):
    """Base class of the request schemas that have no `Options`. `null` means absent; unknown fields are ignored."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the settings of this gateway say about texts, for all dialects."""

    max_texts: int
    max_text_bytes: int
    max_openai_inputs: int
    """The most texts of one OpenAI request; their own service has this limit, and clients cut their lists by it."""
    accept_empty: bool
    """Whether OpenAI's and TEI's dialects embed an empty string. They refuse it, if this is false."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusals:
    """How refusals look in one dialect: a function that writes them, and what the OpenAPI document says of them."""

    error_body: ErrorBody
    reply: type[BaseModel]
    statuses: tuple[int, ...]


class WriteReply(Protocol):
    """Writes the body of a reply, in parts, around `items`: each is one item of the reply's list or several, joined by
    commas. A dialect names the facts that its reply tells, and ignores the others.
    """

    def __call__(
        self,
        items: list[bytes],
        /,
        *,
        texts: Sequence[str],
        model: str,
        dimension: int,
        tokens: int,
        cached: int,
        took_s: float,
        edition: str,
    ) -> list[bytes]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """One way to ask for vectors, as two pure functions: `parse` and `write`."""

    name: str
    texts_field: str
    """The field that holds the texts. It tells dialects that share a path apart."""
    parse: Parse
    """Returns the texts, or lists of token ids if there is a `decode`, and the options. Raises `Problem`."""
    write: WriteReply
    refusals: Refusals
    write_items: WriteItems | None = None
    """Turns encoded vectors of the texts from a given place on into items; None: an item is the vector alone."""
    decode: Decode | None = None
    """Turns lists of token ids into texts, and checks them as `parse` does. It is the one step that may yield."""


def spoken_in(body: bytes, dialects: Sequence[Dialect]) -> Dialect:
    """Returns the dialect whose field of texts is in `body`.

    The first dialect gets a body that is no JSON object, and refuses it. Raises `MalformedBody` for two dialects at
    once, and `BodyTooLarge`. A field that is null counts only if no other is there.
    """
    native.check_crowd(body)  # before the parser makes each list and object of a body that was made to hold millions
    try:
        fields = from_json(body)  # takes what the dialects' own parser takes, NaN for one
    except ValueError:
        return dialects[0]
    if not isinstance(fields, dict):
        return dialects[0]
    named = [dialect for dialect in dialects if dialect.texts_field in fields]
    present = [dialect for dialect in named if fields[dialect.texts_field] is not None]
    if len(present) > 1:
        raise _ambiguous(present, dialects)
    return (present or named or dialects)[0]


def _ambiguous(present: Sequence[Dialect], dialects: Sequence[Dialect]) -> MalformedBody:
    *first, last = [f"{dialect.texts_field} ({dialect.name})" for dialect in dialects]
    value = " and ".join(dialect.texts_field for dialect in present)
    return MalformedBody(
        f"body: one of {', '.join(first)} and {last}, got {value}",
        field="body",
        limit="|".join(dialect.texts_field for dialect in dialects),
        value=value,
    )
