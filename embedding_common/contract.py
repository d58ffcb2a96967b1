"""The internal contract between gateway and replica: header names, lanes, the model card, the binary reply.

A binary reply is a safetensors file (https://github.com/huggingface/safetensors, "Format"): eight bytes of
little-endian header length, a JSON header, then the raw tensors

    embeddings  F32  [n, dimension]   the model's own vectors, full dimension, row i belongs to text i
    tokens      I32  [n]              tokens of text i before truncation, special tokens included
    truncated   BOOL [n]              whether text i was cut to the model's limit

with the replica's model card as JSON under `__metadata__.card`. Written and read here because the safetensors
library drops the metadata when it reads from memory and copies every tensor; tests hold both ends to the library.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Mapping, Sequence  # noqa: TC003 - pydantic reads the annotations
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import orjson
from pydantic import Field, TypeAdapter, ValidationError

from embedding_common.errors import InvalidRequest

if TYPE_CHECKING:
    from numpy.typing import NDArray

REQUEST_ID_HEADER = "x-request-id"
PRIORITY_HEADER = "x-priority"
TIMEOUT_HEADER = "x-request-timeout-ms"
FINGERPRINT_HEADER = "x-model-fingerprint"
BINARY_TYPE = "application/vnd.safetensors"

INTERACTIVE_MAX_TEXTS = 4
"""The most texts of a request that counts as interactive if it has no priority header; more texts count as bulk."""

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 1 << 20


class Lane(enum.StrEnum):
    """The lane of a request: a person waits for the answer (interactive), or a job (bulk)."""

    INTERACTIVE = "interactive"
    BULK = "bulk"


def choose_lane(header: str | None, texts: int) -> Lane:
    """Returns the lane that a request asks for, else the one that its size suggests. Raises `InvalidRequest`."""
    if header is None:
        return Lane.INTERACTIVE if texts <= INTERACTIVE_MAX_TEXTS else Lane.BULK
    try:
        return Lane(header.strip().lower())
    except ValueError:
        allowed = "|".join(Lane)
        raise InvalidRequest(
            f"{PRIORITY_HEADER}: must be one of {allowed}, got {header[:40]!r}",
            field=PRIORITY_HEADER,
            limit=allowed,
            value=header[:40],
        ) from None


def parse_timeout_s(header: str | None) -> float | None:
    """Returns the seconds that the caller allows for the whole request, or None. Raises `InvalidRequest`."""
    if header is None:
        return None
    try:
        timeout_ms = float(header)
    except ValueError:
        timeout_ms = -1.0
    if not 0 < timeout_ms < float("inf"):
        raise InvalidRequest(
            f"{TIMEOUT_HEADER}: must be a number of milliseconds above 0, got {header[:40]!r}",
            field=TIMEOUT_HEADER,
            limit="> 0",
            value=header[:40],
        )
    return timeout_ms / 1000


class WireError(ValueError):
    """A reply of a replica breaks the contract. The message goes to the log, not to a caller."""


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a gateway must know of a loaded model to build cache keys and check requests.

    `fingerprint` changes with anything that changes a vector: weights, pooling, max length, backend, dtype.
    `pooling` is sentence-transformers' name for it, such as "mean" or "cls"; "" if the model does not say.
    """

    id: Annotated[str, Field(min_length=1)]
    fingerprint: Annotated[str, Field(min_length=1)]
    dimension: Annotated[int, Field(ge=1)]
    max_tokens: Annotated[int, Field(ge=1)]
    backend: str = ""
    dtype: str = ""
    pooling: str = ""
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None

    def prompt(self, name: str | None) -> str:
        """Returns the prompt that is put before each text, "" for none. Raises `InvalidRequest` for an unknown name."""
        name = name if name is not None else self.default_prompt_name
        if name is None:
            return ""
        try:
            return self.prompts[name]
        except KeyError:
            known = ", ".join(sorted(self.prompts)) or "none"
            raise InvalidRequest(
                f"prompt_name: model {self.id} has the prompts: {known}; got {name[:80]!r}",
                field="prompt_name",
                limit=known,
                value=name[:80],
            ) from None

    def to_json(self) -> str:
        """Returns canonical JSON: equal cards give equal text."""
        return orjson.dumps(asdict(self), option=orjson.OPT_SORT_KEYS).decode()

    @staticmethod
    @functools.lru_cache(maxsize=64)  # every reply carries the same few cards
    def from_json(text: str | bytes) -> ModelCard:
        """Reads a card. Raises `WireError` on anything that `to_json` would not write."""
        try:
            return _CARD.validate_json(text)
        except ValidationError as invalid:
            raise WireError(f"not a model card: {invalid.errors(include_url=False, include_input=False)[0]}") from None


_CARD = TypeAdapter(ModelCard)


@dataclass(frozen=True, slots=True)
class ListedModel:
    """One model of a replica's `GET /models`. It has a card once the model has been loaded there."""

    id: Annotated[str, Field(min_length=1)]
    state: str
    card: ModelCard | None = None


@dataclass(frozen=True, slots=True)
class ModelList:
    """What a replica's `GET /models` says: every model that it may load, and which one answers if none is named."""

    default: str
    models: Sequence[ListedModel]

    @staticmethod
    def from_json(text: str | bytes) -> ModelList:
        """Reads a list. Unknown fields are ignored. Raises `WireError`."""
        try:
            listed = _LIST.validate_json(text)
        except ValidationError as invalid:
            raise WireError(f"not a model list: {invalid.errors(include_url=False, include_input=False)[0]}") from None
        if listed.default not in {model.id for model in listed.models}:
            raise WireError(f"the default model {listed.default!r} is not in the list")
        return listed


_LIST = TypeAdapter(ModelList)


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """One text of `POST /tokenize`. Offsets count characters of the text with its prompt; null for special tokens."""

    ids: Sequence[int]
    tokens: Sequence[str]
    offsets: Sequence[tuple[int, int] | None]
    special: Sequence[bool]


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A replica's reply to `POST /tokenize`: an item for each text, in order."""

    model: str
    texts: Sequence[TokenizedText]

    @staticmethod
    def from_json(text: str | bytes) -> Tokenized:
        """Reads a reply. Raises `WireError`."""
        try:
            return _TOKENIZED.validate_json(text)
        except ValidationError as invalid:
            raise WireError(f"not tokens: {invalid.errors(include_url=False, include_input=False)[0]}") from None


_TOKENIZED = TypeAdapter(Tokenized)


@dataclass(frozen=True, slots=True, eq=False)
class Embedded:
    """The vectors of a list of texts, as they travel from replica to gateway.

    vectors float32 [n, dimension], tokens int32 [n] before truncation, truncated bool [n].
    """

    card: ModelCard
    vectors: NDArray[np.float32]
    tokens: NDArray[np.int32]
    truncated: NDArray[np.bool_]

    def to_bytes(self) -> bytes:
        """Returns the safetensors file that the module describes."""
        tensors: list[tuple[str, str, NDArray[Any]]] = [
            ("embeddings", "F32", np.ascontiguousarray(self.vectors, "<f4")),
            ("tokens", "I32", np.ascontiguousarray(self.tokens, "<i4")),
            ("truncated", "BOOL", np.ascontiguousarray(self.truncated, "?")),
        ]
        header: dict[str, Any] = {"__metadata__": {"card": self.card.to_json()}}
        offset = 0
        for name, dtype, array in tensors:
            end = offset + array.nbytes
            header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": (offset, end)}
            offset = end
        packed = orjson.dumps(header)
        packed += b" " * (-len(packed) % 8)  # the format aligns the data to eight bytes
        length = len(packed).to_bytes(_LENGTH_BYTES, "little")
        return b"".join((length, packed, *(array.tobytes() for _, _, array in tensors)))

    @classmethod
    def from_bytes(cls, body: bytes, *, texts: int) -> Embedded:
        """Reads a file without copying a vector, and checks that it answers `texts` texts. Raises `WireError`."""
        length = int.from_bytes(body[:_LENGTH_BYTES], "little")
        if len(body) < _LENGTH_BYTES or length > min(_MAX_HEADER_BYTES, len(body) - _LENGTH_BYTES):
            raise WireError(f"{len(body)} bytes are no safetensors file")
        try:
            header = orjson.loads(body[_LENGTH_BYTES : _LENGTH_BYTES + length])
            card = ModelCard.from_json(header["__metadata__"]["card"])
            data = memoryview(body)[_LENGTH_BYTES + length :]
            vectors = _tensor(header, data, "embeddings", "F32", "<f4", (texts, card.dimension))
            tokens = _tensor(header, data, "tokens", "I32", "<i4", (texts,))
            truncated = _tensor(header, data, "truncated", "BOOL", "?", (texts,))
        except (KeyError, TypeError, ValueError) as problem:
            raise WireError(f"broken safetensors reply: {problem!r}") from None
        if not np.isfinite(vectors).all():
            raise WireError("the reply holds NaN or infinity")
        if tokens.min(initial=0) < 0:  # no entry can hold it, and no count may fall
            raise WireError("the reply holds a number of tokens below 0")
        return cls(card, vectors, tokens, truncated)


def _tensor(
    header: dict[str, Any], data: memoryview, name: str, kind: str, dtype: str, shape: tuple[int, ...]
) -> NDArray[Any]:
    spec = header[name]
    if spec["dtype"] != kind or tuple(spec["shape"]) != shape:
        raise WireError(f"{name} is {spec['dtype']} {spec['shape']}, expected {kind} {list(shape)}")
    start, end = spec["data_offsets"]
    if not 0 <= start <= end <= len(data):
        raise WireError(f"{name} lies outside the file")
    return np.frombuffer(data[start:end], dtype).reshape(shape)
