"""Stand-ins for the model and the clock. A held model computes one slice each time it is told to."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ml_base.backends import Tokenized
from ml_base.models import LoadedModel
from ml_base.wire import ModelCard

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from ml_base.slices import SliceReport
    from ml_base.wire import Lane

POISON = "poison"
MAX_TOKENS = 8


async def until(condition: Callable[[], bool]) -> None:
    """Lets other tasks and threads run until `condition()`; a test that waits in vain fails after five seconds."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.0005)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def vector_of(text: str) -> NDArray[np.float32]:
    """Tells texts apart: their first letters are in it."""
    return np.array([len(text), *text.ljust(3).encode()[:3]], np.float32)


class Model:
    """Texts are strings, their length in characters is their length in tokens."""

    def __init__(self, *, held: bool = False) -> None:
        self.slices: list[list[str]] = []
        self.gate = threading.Semaphore(0 if held else 1_000_000)

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.slices.append(list(texts))
        assert self.gate.acquire(timeout=5), "nobody let the model go on"
        if POISON in texts:
            raise ValueError("cannot compute this")
        return np.stack([vector_of(text) for text in texts])

    def finish(self, slices: int = 1) -> None:
        self.gate.release(slices)


@dataclass
class Notes:
    """An observer that remembers."""

    reports: list[SliceReport] = field(default_factory=list)
    refusals: list[tuple[Lane, int]] = field(default_factory=list)
    drops: list[tuple[Lane, int]] = field(default_factory=list)

    def slice_done(self, report: SliceReport) -> None:
        self.reports.append(report)

    def refused(self, lane: Lane, texts: int) -> None:
        self.refusals.append((lane, texts))

    def dropped(self, lane: Lane, texts: int) -> None:
        self.drops.append((lane, texts))


class FakeBackend:
    """A token is a character. Vectors are those of `vector_of` for the characters that are left after cutting."""

    name = "fake"
    dtype = "float32"
    max_tokens = MAX_TOKENS
    default_prompt_name = None
    self_test: float | None = None

    def __init__(self, *, held: bool = False) -> None:
        self.prompts = {"query": "ask "}
        self.model = Model(held=held)
        self.tokenized: list[list[str]] = []

    def identity(self) -> bytes:
        return b"fake"

    def tokenize(self, texts: Sequence[str], *, prompt: str, direction: str) -> list[Tokenized]:
        self.tokenized.append(list(texts))
        return [self._one(prompt + text, direction) for text in texts]

    def _one(self, text: str, direction: str) -> Tokenized:
        codes = list(text.encode())
        cut = codes[:MAX_TOKENS] if direction == "right" else codes[-MAX_TOKENS:]
        return Tokenized({"input_ids": cut}, len(codes), len(codes) > MAX_TOKENS)

    def embed(self, batch: Sequence[Tokenized]) -> NDArray[np.float32]:
        return self.model([bytes(text.features["input_ids"]).decode() for text in batch])


CARD = ModelCard(id="fake-model", fingerprint="f" * 32, dimension=4, max_tokens=MAX_TOKENS, prompts={"query": "ask "})


def loaded(backend: FakeBackend) -> LoadedModel:
    return LoadedModel(CARD, backend)
