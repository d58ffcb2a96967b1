"""Stand-ins for the model and the clock. A held model computes one batch each time it is told to."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from embedding_common.contract import ModelCard, TokenizedText
from ml_base.backends import Tokenized
from ml_base.batching.batches import Grid
from ml_base.machine.worker import Worker
from ml_base.models.loading import LoadedModel, Source
from ml_base.models.models import ServedModel

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from embedding_common.contract import Lane
    from ml_base.batching.batches import BatchReport

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
    """Returns a vector that tells texts apart: their first letters are in it."""
    return np.array([len(text), *text.ljust(3).encode()[:3]], np.float32)


class Text(str):
    """A tokenized text whose tokens are its characters."""

    __slots__ = ()

    @property
    def length(self) -> int:
        return len(self)


class Model:
    """Texts are strings, their length in characters is their length in tokens."""

    def __init__(self, *, held: bool = False) -> None:
        self.batches: list[list[str]] = []
        self.gate = threading.Semaphore(0 if held else 1_000_000)

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.batches.append(list(texts))
        assert self.gate.acquire(timeout=5), "the test did not let the model go on"
        if POISON in texts:
            raise ValueError("cannot compute this")
        return np.stack([vector_of(text) for text in texts])

    def finish(self, batches: int = 1) -> None:
        self.gate.release(batches)


@dataclass
class Notes:
    """An observer that remembers."""

    reports: list[BatchReport] = field(default_factory=list)
    refusals: list[tuple[Lane, int]] = field(default_factory=list)
    drops: list[tuple[Lane, int]] = field(default_factory=list)
    cut: int = 0
    in_memory: list[str] = field(default_factory=list)  # ids of models

    def batch_done(self, report: BatchReport) -> None:
        self.reports.append(report)

    def refused(self, lane: Lane, texts: int) -> None:
        self.refusals.append((lane, texts))

    def dropped(self, lane: Lane, texts: int) -> None:
        self.drops.append((lane, texts))

    def truncated(self, texts: int) -> None:
        self.cut += texts

    def model_loaded(self, card: ModelCard) -> None:
        self.in_memory.append(card.id)

    def model_unloaded(self, card: ModelCard) -> None:
        self.in_memory.remove(card.id)


class FakeBackend:
    """A token is a character. Vectors are those of `vector_of` for the characters that are left after cutting."""

    name = "fake"
    dtype = "float32"
    grid = Grid()
    in_calling_thread = True
    max_tokens = MAX_TOKENS
    pooling = "mean"
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
        cut = codes[: self.max_tokens] if direction == "right" else codes[-self.max_tokens :]
        return Tokenized({"input_ids": cut}, len(cut), len(codes), len(codes) > self.max_tokens)

    def describe(self, texts: Sequence[str], *, prompt: str, add_special_tokens: bool) -> list[TokenizedText]:
        """A special token, of id 0, stands before each text."""
        return [_described(prompt + text, special=add_special_tokens) for text in texts]

    def embed(self, batch: Sequence[Tokenized]) -> NDArray[np.float32]:
        return self.model([bytes(text.features["input_ids"]).decode() for text in batch])


def _described(text: str, *, special: bool) -> TokenizedText:
    start: list[tuple[int, int] | None] = [None] * special
    return TokenizedText(
        ids=[0] * special + [ord(character) for character in text],
        tokens=["<s>"] * special + list(text),
        offsets=[*start, *((i, i + 1) for i in range(len(text)))],
        special=[True] * special + [False] * len(text),
    )


CARD = ModelCard(id="fake-model", fingerprint="f" * 32, dimension=4, max_tokens=MAX_TOKENS, prompts={"query": "ask "})
BATCH_TOKENS = 64


def loaded(backend: FakeBackend, model_id: str = CARD.id, *, batch_tokens: int = BATCH_TOKENS) -> LoadedModel:
    return LoadedModel(replace(CARD, id=model_id), backend, batch_tokens, memory_bytes=1000)


class FakeLoader:
    """Loads models over fakes. Held, it waits in the loader's thread each time until the test lets it go on."""

    def __init__(self, *, held: bool = False) -> None:
        self.asked: list[str] = []
        self.backends: dict[str, FakeBackend] = {}  # the newest of each model
        self.problem: Exception | None = None
        self.gate = threading.Semaphore(0 if held else 1_000_000)

    def __call__(self, source: Source) -> LoadedModel:
        self.asked.append(source.id)
        assert self.gate.acquire(timeout=5), "the test did not let the loading go on"
        if self.problem is not None:
            raise self.problem
        self.backends[source.id] = FakeBackend()
        return loaded(self.backends[source.id], source.id)

    def finish(self) -> None:
        self.gate.release()


def sources(*ids: str) -> list[Source]:
    return [Source(name, name, local=True, found_as="folder") for name in ids]


def server(**options: Any) -> Any:
    """Returns the function that connects a loaded model with its threads."""
    defaults: Mapping[str, Any] = {
        "max_batch_texts": 16,
        "patience_s": 0.05,
        "max_queue_texts": 500,
        "bulk_share": 0.2,
        "observer": Notes(),
    }
    return partial(ServedModel, **{**defaults, **options})


@asynccontextmanager
async def workers(clock: Callable[[], float] = time.monotonic) -> AsyncIterator[dict[str, Worker]]:
    """The two threads that served models share."""
    async with Worker("tokenizer", clock=clock) as tokenizing, Worker("inference", clock=clock) as inference:
        yield {"tokenizing": tokenizing, "inference": inference}
