"""Which models are loaded: the default one always, the others from their first request until nobody asks for them."""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

from embedding_common import errors, native
from ml_base.machine.memory import give_back
from ml_base.machine.worker import Worker
from ml_base.models.served import time_limit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from embedding_common.contract import Lane, ModelCard
    from ml_base.models.loading import LoadedModel, Source
    from ml_base.models.served import ServedModel

log = logging.getLogger(__name__)

LOAD_RETRY_AFTER_S = 5.0  # a model that could not be loaded may be there after another look, not after a moment


class State(enum.StrEnum):
    UNLOADED = "unloaded"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    """The last attempt failed; the next request for it is another one."""


class Serve(Protocol):
    """Puts a loaded model before the two threads that all models share."""

    def __call__(self, loaded: LoadedModel, *, tokenizing: Worker, inference: Worker) -> ServedModel: ...


class ModelsObserver(Protocol):
    def model_loaded(self, card: ModelCard) -> None: ...
    def model_unloaded(self, card: ModelCard) -> None: ...


@dataclass(slots=True)
class _Place:
    """One model that may be served here, loaded or not."""

    source: Source
    state: State = State.UNLOADED
    card: ModelCard | None = None  # kept when it is unloaded: a gateway builds cache keys from it
    served: ServedModel | None = None
    self_test: float | None = None
    memory_bytes: int | None = None
    problem: str | None = None
    loading: asyncio.Task[ServedModel] | None = None
    users: int = 0
    used_at: float = 0.0


class Models:
    """Owns the loaded models and the threads they share, as an async context manager.

    Models take turns on one inference thread, a slice each, so that together they use the cores of one. Loading has a
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
        self._places = {source.id: _Place(source) for source in sources}
        self._default = self._places[sources[0].id]
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
        states = " ".join(f"{name}={place.state}" for name, place in self._places.items())
        return f"<Models {states}>"

    async def __aenter__(self) -> Self:
        for worker in (self._inference, self._tokenizing, self._loader):
            await worker.__aenter__()
        for name, loaded in self._preloaded.items():
            await self._put(self._places[name], loaded)
        self._preloaded = {}
        if self._unload_after_s:
            self._start(self._unload_idle())
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for place in self._places.values():
            if place.served is not None:
                await place.served.__aexit__()
        for worker in (self._loader, self._tokenizing, self._inference):
            await worker.__aexit__()

    @property
    def default_id(self) -> str:
        return self._default.source.id

    @property
    def ids(self) -> list[str]:
        """The default model first."""
        return list(self._places)

    def troubles(self, *, stuck_s: float) -> list[str]:
        """Why nothing more may be sent here; empty when all is well."""
        ages = {worker.name: worker.running_for_s() for worker in (self._inference, self._tokenizing)}
        stuck = [f"{name} stuck for {age:.0f} s" for name, age in ages.items() if age > stuck_s]
        alive = self._default.served is not None and self._default.served.batcher.alive
        return stuck if alive else [*stuck, "inference ended"]

    def running_for_s(self) -> float:
        """Age of the slice that runs now, 0 when idle."""
        return self._inference.running_for_s()

    def waiting(self, lane: Lane) -> int:
        """Texts admitted to a lane of any model and not yet settled."""
        return sum(place.served.batcher.reserved(lane) for place in self._places.values() if place.served)

    def listed(self) -> list[dict[str, Any]]:
        """What `/models` says of each, the default first."""
        return [
            {
                "id": name,
                "state": place.state,
                "card": place.card,
                "self_test": place.self_test,  # lowest cosine to torch in float32; null: it is torch in float32
                "slice_tokens": place.served.slice_tokens if place.served else None,
                "memory_bytes": place.memory_bytes,  # by how much the process grew when it was loaded
                "problem": place.problem,
            }
            for name, place in self._places.items()
        ]

    @asynccontextmanager
    async def use(self, model_id: str | None, *, timeout_s: float | None = None) -> AsyncIterator[ServedModel]:
        """A model, loaded if it has to be; while in use it is not unloaded. Raises `UnknownModel`, `Unavailable`."""
        place = self._places[native.check_model(model_id, self.ids)]
        place.users += 1
        try:
            yield place.served or await self._loaded(place, timeout_s)
        finally:
            place.users -= 1
            place.used_at = self._clock()

    async def load(self, model_id: str) -> None:
        """Raises `UnknownModel`, `Unavailable`."""
        async with self.use(model_id):
            pass

    async def unload(self, model_id: str) -> None:
        """Raises `UnknownModel`, and `InvalidRequest` for a model that has to stay, or is in use."""
        place = self._places[native.check_model(model_id, self.ids)]
        if place is self._default or place.users:
            why = "is the default model" if place is self._default else f"answers {place.users} requests just now"
            raise errors.InvalidRequest(f"model_id: {model_id} {why}", field="model_id", value=place.users)
        await self._unload(place)

    async def _loaded(self, place: _Place, timeout_s: float | None) -> ServedModel:
        """Joins the loading under way, or starts it; it goes on when a caller leaves."""
        if place.loading is None:
            place.state, place.problem = State.LOADING, None
            place.loading = self._start(self._bring(place))
        async with time_limit(timeout_s):
            return await asyncio.shield(place.loading)

    async def _bring(self, place: _Place) -> ServedModel:
        try:
            return await self._put(place, await self._loader.run(lambda: self._load(place.source)))
        except Exception as problem:  # noqa: BLE001 - whatever it was, it is told to all who wait, and tried again
            place.state, place.problem = State.FAILED, str(problem)[:300]
            problem.__context__ = problem.__traceback__ = None  # their frames hold the model that failed
            log.warning("%s", problem)
            raise errors.Unavailable(
                f"model_id: {place.problem}", field="model_id", retry_after_s=LOAD_RETRY_AFTER_S
            ) from None
        finally:
            place.loading = None

    async def _put(self, place: _Place, loaded: LoadedModel) -> ServedModel:
        served = self._serve(loaded, tokenizing=self._tokenizing, inference=self._inference)
        await served.__aenter__()
        place.served, place.card, place.self_test = served, served.card, served.self_test
        place.memory_bytes = loaded.memory_bytes
        place.state, place.used_at = State.READY, self._clock()
        self._observer.model_loaded(served.card)
        return served

    async def _unload_idle(self) -> None:
        while True:
            await asyncio.sleep(self._unload_after_s / 4)
            for place in self._places.values():
                idle_s = self._clock() - place.used_at
                if place is not self._default and not place.users and idle_s >= self._unload_after_s:
                    await self._unload(place)

    async def _unload(self, place: _Place) -> None:
        """Nobody uses it. Whoever asks from now on has it loaded again."""
        served, place.served = place.served, None
        if served is None:
            return
        place.state, place.memory_bytes = State.UNLOADED, None
        self._observer.model_unloaded(served.card)
        await served.__aexit__()
        log.info("model=%s unloaded", served.card.id)
        del served
        await self._loader.run(give_back)

    def _start(self, work: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen: whoever waited for a loading that failed may have left
