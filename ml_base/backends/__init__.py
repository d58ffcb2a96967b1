"""What a backend is. Importing this loads no numeric library; a backend's own module does, when it is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from embedding_common.contract import TokenizedText
    from ml_base.batching.batches import Grid

Direction = Literal["left", "right"]


class UnsupportedModelError(Exception):
    """The model loads, but this server cannot serve it; the message says why."""


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a model is loaded.

    `local` means that only the folder, or the hub's cache, is searched. `cache_dir` keeps converted models, unless
    `baked_dir` has them already.
    """

    local: bool
    threads: int
    cache_dir: Path
    dtype: str = "auto"
    device: str = "auto"
    baked_dir: Path | None = None


@dataclass(frozen=True, slots=True)
class Tokenized:
    """One text, cut to the model's limit, not yet padded.

    `features` are the model's inputs by name, `length` values each: the tokens that the model has to compute. `tokens`
    counts the text before it was cut, prompt and special tokens included. `prompt_tokens` is how many
    leading ones pooling has to leave out: 0 for a model that pools its prompt.
    """

    features: Mapping[str, Sequence[int]]
    length: int
    tokens: int
    truncated: bool
    prompt_tokens: int = 0


class Backend(Protocol):
    """A loaded model. `tokenize` and `embed` may run at the same time, but each of them in one thread only."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def grid(self) -> Grid:
        """The shapes that it computes; `embed` pads to them."""

    @property
    def in_calling_thread(self) -> bool:
        """Whether `embed` with one thread computes in the thread that calls it."""

    @property
    def max_tokens(self) -> int: ...
    @property
    def pooling(self) -> str:
        """How the vectors of the tokens become one, in the words of the model card."""

    @property
    def prompts(self) -> Mapping[str, str]: ...
    @property
    def default_prompt_name(self) -> str | None: ...
    @property
    def self_test(self) -> float | None:
        """The lowest cosine to the reference, found at load; None for the reference itself."""

    def identity(self) -> bytes:
        """Returns a digest of what decides a vector and is not in the card: weights, modules, tokenizer."""

    def tokenize(self, texts: Sequence[str], *, prompt: str, direction: Direction) -> list[Tokenized]:
        """Tokenizes each text behind `prompt`; `direction` is the side that is cut off if it is too long."""

    def describe(self, texts: Sequence[str], *, prompt: str, add_special_tokens: bool) -> list[TokenizedText]:
        """Returns every token of each text, uncut, to be shown; runs in the thread of `tokenize`."""

    def embed(self, batch: Sequence[Tokenized]) -> NDArray[np.float32]:
        """Returns the model's own output, float32 [len(batch), dimension]."""
