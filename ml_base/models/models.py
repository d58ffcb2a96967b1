"""The models of a replica: `Models` says which are loaded, `ServedModel` turns texts into vectors with token counts.

The default model is always loaded. Each other one is loaded by the first request for it, and unloaded when no request
has come for a while.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from embedding_common import errors, refusals
from embedding_common.contract import Embedded, Lane
from ml_base.batching.batcher import Batcher, Observer
from ml_base.batching.batches import BatchLimits
from ml_base.machine.memory import release_memory
from ml_base.machine.worker import Worker
from ml_base.models.record import ModelRecord, State

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence

    from embedding_common.contract import ModelCard, TokenizedText
    from ml_base.backends import Direction, Tokenized
    from ml_base.models.loading import LoadedModel, Source

log = logging.getLogger(__name__)

LOAD_RETRY_AFTER_S = 5.0  # a model that could not be loaded may be there at another attempt, but not in a moment

CHUNK_TEXTS = 64
CHUNK_CHARS = 65_536
"""How much of a long list is tokenized at once, in texts and characters. That takes some milliseconds, so that another
text need not wait for the whole list."""


class Serve(Protocol):
    """Connects a loaded model with the two threads that all models share."""

    def __call__(self, loaded: LoadedModel, *, tokenizing: Worker, inference: Worker) -> ServedModel: ...


class ModelsObserver(Protocol):
    """Is told which models are in memory."""

    def model_loaded(self, card: ModelCard) -> None: ...
    def model_unloaded(self, card: ModelCard) -> None: ...


class Models:
    """Owns the loaded models and the threads they share, as an async context manager.

    Models take turns on one inference thread, a batch each, so that together they use the cores of one. Loading has a
    thread of its own: neither requests nor health checks wait for it.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        preloaded: Mapping[str, LoadedModel],
        load: Callable[[Source], LoadedModel],
        serve: Serve,
        observer: ModelsObserver,
        unload_after_s: float,
        nice: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """The first source is the default model; `preloaded` holds at least that one. `unload_after_s` 0: never."""
        self._records = {source.id: ModelRecord(source) for source in sources}
        self._default = self._records[sources[0].id]
        self._preloaded = preloaded
        self._load = load
        self._serve = serve
        self._observer = observer
        self._unload_after_s = unload_after_s
        self._clock = clock
        self._inference = Worker("inference", nice=nice, clock=clock)
        self._tokenizing = Worker("tokenizer", clock=clock)
        self._loader = Worker("loader", nice=nice, clock=clock)
        self._tasks: set[asyncio.Task[Any]] = set()

    def __repr__(self) -> str:
        states = " ".join(f"{name}={record.state}" for name, record in self._records.items())
        return f"<Models {states}>"

    async def __aenter__(self) -> Self:
        for worker in (self._inference, self._tokenizing, self._loader):
            await worker.__aenter__()
        for name, loaded in self._preloaded.items():
            await self._start_serving(self._records[name], loaded)
        self._preloaded = {}
        if self._unload_after_s:
            self._start(self._unload_idle())
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for record in self._records.values():
            if record.served is not None:
                await record.served.__aexit__()
        for worker in (self._loader, self._tokenizing, self._inference):
            await worker.__aexit__()

    @property
    def default_id(self) -> str:
        """The id of the default model."""
        return self._default.source.id

    @property
    def ids(self) -> list[str]:
        """The ids of all models, the default model first."""
        return list(self._records)

    def unhealthy(self, *, stuck_s: float) -> list[str]:
        """Returns the reasons why nothing more may be sent here; none if all is well."""
        ages = {worker.name: worker.running_for_s() for worker in (self._inference, self._tokenizing)}
        stuck = [f"{name} stuck for {age:.0f} s" for name, age in ages.items() if age > stuck_s]
        alive = self._default.served is not None and self._default.served.batcher.alive
        return stuck if alive else [*stuck, "inference ended"]

    def running_for_s(self) -> float:
        """Returns the age of the batch that runs now, in seconds; 0 when idle."""
        return self._inference.running_for_s()

    def waiting(self, lane: Lane) -> int:
        """Returns the number of texts admitted to a lane of any model and not yet settled."""
        return sum(record.served.batcher.reserved(lane) for record in self._records.values() if record.served)

    def listed(self) -> list[dict[str, Any]]:
        """Returns what `/models` says of each, the default model first."""
        return [record.listed() for record in self._records.values()]

    @asynccontextmanager
    async def use(self, model_id: str | None, *, timeout_s: float | None = None) -> AsyncIterator[ServedModel]:
        """A model, loaded if it has to be; while in use it is not unloaded. Raises `UnknownModel`, `Unavailable`."""
        record = self._default if model_id is None else self._records.get(model_id) or self._named(model_id)
        record.users += 1
        try:
            yield record.served or await self._loaded(record, timeout_s)
        finally:
            record.users -= 1
            record.used_at = self._clock()

    async def load(self, model_id: str) -> None:
        """Raises `UnknownModel`, `Unavailable`."""
        async with self.use(model_id):
            pass

    async def unload(self, model_id: str) -> None:
        """Raises `UnknownModel`, and `InvalidRequest` for a model that has to stay, or is in use."""
        record = self._named(model_id)
        if record is self._default or record.users:
            why = "is the default model" if record is self._default else f"answers {record.users} requests just now"
            raise errors.InvalidRequest(f"model_id: {model_id} {why}", field="model_id", value=record.users)
        await self._unload(record)

    def _named(self, model_id: str) -> ModelRecord:
        """Raises `UnknownModel`."""
        return self._records[refusals.check_model(model_id, self.ids)]

    async def _loaded(self, record: ModelRecord, timeout_s: float | None) -> ServedModel:
        """Joins the loading under way, or starts it; it goes on when a caller leaves."""
        if record.loading is None:
            record.state, record.problem = State.LOADING, None
            record.loading = self._start(self._load_and_serve(record))
        async with time_limit(timeout_s):
            return await asyncio.shield(record.loading)

    async def _load_and_serve(self, record: ModelRecord) -> ServedModel:
        try:
            loaded = await self._loader.run(lambda: self._load(record.source))
            return await self._start_serving(record, loaded)
        except Exception as problem:  # noqa: BLE001 - every failure is told to all who wait, and tried again
            record.state, record.problem = State.FAILED, str(problem)[:300]
            problem.__context__ = problem.__traceback__ = None  # their frames hold the model that failed
            log.warning("%s", problem)
            raise errors.Unavailable(
                f"model_id: {record.problem}", field="model_id", retry_after_s=LOAD_RETRY_AFTER_S
            ) from None
        finally:
            record.loading = None

    async def _start_serving(self, record: ModelRecord, loaded: LoadedModel) -> ServedModel:
        served = self._serve(loaded, tokenizing=self._tokenizing, inference=self._inference)
        await served.__aenter__()
        record.served, record.card, record.self_test = served, served.card, served.self_test
        record.memory_bytes = loaded.memory_bytes
        record.state, record.used_at = State.READY, self._clock()
        self._observer.model_loaded(served.card)
        return served

    async def _unload_idle(self) -> None:
        while True:
            await asyncio.sleep(self._unload_after_s / 4)
            for record in self._records.values():
                idle_s = self._clock() - record.used_at
                if record is not self._default and not record.users and idle_s >= self._unload_after_s:
                    await self._unload(record)

    async def _unload(self, record: ModelRecord) -> None:
        """Unloads a model that no request uses. The next request for it loads it again."""
        served, record.served = record.served, None
        if served is None:
            return
        record.state, record.memory_bytes = State.UNLOADED, None
        self._observer.model_unloaded(served.card)
        await served.__aexit__()
        log.info("model=%s unloaded", served.card.id)
        del served
        await self._loader.run(release_memory)

    def _start(self, work: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # marks it as seen: the request that waited for a failed loading may have left


class ServedModel:
    """A loaded model with its two threads, as an async context manager.

    The thread `tokenizing` is one, because a tokenizer used by several threads leaks truncation settings from one call
    into another; the thread `inference` computes. So a text is tokenized once, beside the batch that runs, and the
    batcher knows its length.
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
        self.batch_tokens = loaded.batch_tokens
        self._backend = loaded.backend
        self._tokenizing = tokenizing
        self._clock = clock
        self._observer = observer
        limits = BatchLimits(
            max_texts=max_batch_texts,
            max_tokens=loaded.batch_tokens,
            patience_s=patience_s,
            grid=loaded.backend.grid,
        )
        self.batcher: Batcher[Tokenized] = Batcher(
            loaded.backend.embed,
            worker=inference,
            limits=limits,
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
        """Returns vectors float32 [texts, dimension] with token counts; row i belongs to texts[i].

        If the call is cancelled or late, the texts that still wait are never computed. Raises `InvalidRequest` for an
        unknown prompt, or for a text over the limit if `truncate` is false; `Overloaded`, `BodyTooLarge`,
        `DeadlineExceeded`, `Unavailable` and `InferenceFailed`.
        """
        prompt = self.card.prompt(prompt_name)
        deadline = float("inf") if timeout_s is None else self._clock() + timeout_s
        tokens: list[int] = []
        truncated: list[bool] = []
        async with time_limit(timeout_s):
            with self.batcher.admit(len(texts), lane=lane, deadline=deadline) as job:
                for start, chunk in _chunks(texts):
                    tokenized = await self._tokenize(chunk, prompt, direction, lane)
                    if not truncate:
                        self._refuse_truncated(start, tokenized)
                    job.put(tokenized)
                    tokens += [text.tokens for text in tokenized]
                    truncated += [text.truncated for text in tokenized]
                vectors = await job.vectors()
        self._observer.truncated(sum(truncated))
        return Embedded(self.card, vectors, np.array(tokens, np.int32), np.array(truncated, np.bool_))

    async def _tokenize(self, texts: Sequence[str], prompt: str, direction: Direction, lane: Lane) -> list[Tokenized]:
        """A text of 1 MB takes a second, and each job may wait with one: an interactive text waits for one of them."""
        return await self._tokenizing.run(
            functools.partial(self._backend.tokenize, texts, prompt=prompt, direction=direction),
            urgent=lane is Lane.INTERACTIVE,
        )

    async def tokenize(
        self, texts: Sequence[str], *, prompt_name: str | None, add_special_tokens: bool
    ) -> list[TokenizedText]:
        """Returns how the model reads each text, uncut. Raises `InvalidRequest` for an unknown prompt."""
        prompt = self.card.prompt(prompt_name)
        found: list[TokenizedText] = []
        for _, chunk in _chunks(texts):
            found += await self._tokenizing.run(
                functools.partial(self._backend.describe, chunk, prompt=prompt, add_special_tokens=add_special_tokens),
                urgent=True,  # it is little text, and a person waits for it
            )
        return found

    def _refuse_truncated(self, start: int, tokenized: Sequence[Tokenized]) -> None:
        for index, text in enumerate(tokenized, start):
            if text.truncated:
                raise refusals.refuse_truncated(index, text.tokens, self.card)


@asynccontextmanager
async def time_limit(timeout_s: float | None) -> AsyncIterator[None]:
    """Raises `DeadlineExceeded` as soon as the time is over; the batcher only looks when it takes a batch."""
    limit = asyncio.timeout(timeout_s)
    try:
        async with limit:
            yield
    except TimeoutError:
        if not limit.expired():  # it is another limit, inside this one, that has timed out
            raise
        raise errors.DeadlineExceeded(f"no answer within the {timeout_s:.3g} s that were allowed") from None


def _chunks(texts: Sequence[str]) -> Iterator[tuple[int, Sequence[str]]]:
    """Yields (start, texts from there), each within `CHUNK_TEXTS` and `CHUNK_CHARS`, but for a single longer text."""
    start = chars = 0
    for index, text in enumerate(texts):
        if index > start and (index - start >= CHUNK_TEXTS or chars + len(text) > CHUNK_CHARS):
            yield start, texts[start:index]
            start, chars = index, 0
        chars += len(text)
    yield start, texts[start:]
