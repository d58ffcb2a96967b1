"""A loaded model that answers: texts in, vectors with token counts out."""

from __future__ import annotations

import asyncio
import functools
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Self

import numpy as np

from embedding_common import errors, native
from embedding_common.contract import Embedded, Lane
from ml_base.batching.batcher import Batcher, Observer
from ml_base.batching.slices import SliceLimits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from embedding_common.contract import TokenizedText
    from ml_base.backends import Direction, Tokenized
    from ml_base.machine.worker import Worker
    from ml_base.models.loading import LoadedModel

CHUNK_TEXTS = 64
CHUNK_CHARS = 65_536
"""A long list is tokenized in chunks of this much, some milliseconds each, so that a text need not wait for it all."""


class ServedModel:
    """A loaded model before its two threads, as an async context manager.

    `tokenizing`: a tokenizer used by several threads leaks truncation settings from one call into another.
    `inference` computes. So a text is tokenized once, beside the slice that runs, and the batcher knows its length.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        tokenizing: Worker,
        inference: Worker,
        max_batch_texts: int,
        patience_s: float,
        max_queue_texts: int,
        bulk_share: float,
        observer: Observer,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.card = loaded.card
        self.self_test = loaded.backend.self_test
        self.slice_tokens = loaded.slice_tokens
        self._backend = loaded.backend
        self._tokenizing = tokenizing
        self._clock = clock
        self._observer = observer
        self.batcher: Batcher[Tokenized] = Batcher(
            loaded.backend.embed,
            worker=inference,
            limits=SliceLimits(
                max_texts=max_batch_texts,
                max_tokens=loaded.slice_tokens,
                patience_s=patience_s,
                grid=loaded.backend.grid,
            ),
            max_queue_texts=max_queue_texts,
            bulk_share=bulk_share,
            observer=observer,
            clock=clock,
        )

    def __repr__(self) -> str:
        return f"<ServedModel {self.card.id} {self.batcher!r}>"

    async def __aenter__(self) -> Self:
        await self.batcher.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.batcher.__aexit__()

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
        async with time_limit(timeout_s):
            with self.batcher.admit(len(texts), lane=lane, deadline=deadline) as job:
                for start, chunk in _chunks(texts):
                    pieces = await self._tokenize(chunk, prompt, direction, lane)
                    if not truncate:
                        self._refuse_truncated(start, pieces)
                    job.put(pieces)
                    tokens += [piece.tokens for piece in pieces]
                    truncated += [piece.truncated for piece in pieces]
                vectors = await job.vectors()
        self._observer.truncated(sum(truncated))
        return Embedded(self.card, vectors, np.array(tokens, np.int32), np.array(truncated, np.bool_))

    async def _tokenize(self, texts: Sequence[str], prompt: str, direction: Direction, lane: Lane) -> list[Tokenized]:
        """A text of 1 MB takes a second, and each job may have one in the row: a person waits for one, not for all."""
        return await self._tokenizing.run(
            functools.partial(self._backend.tokenize, texts, prompt=prompt, direction=direction),
            urgent=lane is Lane.INTERACTIVE,
        )

    async def tokenize(
        self, texts: Sequence[str], *, prompt_name: str | None, add_special_tokens: bool
    ) -> list[TokenizedText]:
        """How the model reads each text, uncut."""
        prompt = self.card.prompt(prompt_name)
        found: list[TokenizedText] = []
        for _, chunk in _chunks(texts):
            found += await self._tokenizing.run(
                functools.partial(self._backend.describe, chunk, prompt=prompt, add_special_tokens=add_special_tokens),
                urgent=True,  # little text, and somebody who waits
            )
        return found

    def _refuse_truncated(self, start: int, pieces: Sequence[Tokenized]) -> None:
        for index, piece in enumerate(pieces, start):
            if piece.truncated:
                raise native.refuse_truncated(index, piece.tokens, self.card)


@asynccontextmanager
async def time_limit(timeout_s: float | None) -> AsyncIterator[None]:
    """Tells a waiter as soon as its time is over; the batcher only looks when it cuts a slice."""
    limit = asyncio.timeout(timeout_s)
    try:
        async with limit:
            yield
    except TimeoutError:
        if not limit.expired():  # not ours: something inside timed out
            raise
        raise errors.DeadlineExceeded(f"no answer within the {timeout_s:.3g} s that were allowed") from None


def _chunks(texts: Sequence[str]) -> Iterator[tuple[int, Sequence[str]]]:
    """(start, texts from there), each within `CHUNK_TEXTS` and, but for a single longer text, `CHUNK_CHARS`."""
    start = chars = 0
    for index, text in enumerate(texts):
        if index > start and (index - start >= CHUNK_TEXTS or chars + len(text) > CHUNK_CHARS):
            yield start, texts[start:index]
            start, chars = index, 0
        chars += len(text)
    yield start, texts[start:]
