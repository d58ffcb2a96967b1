"""Stand-ins at the gateway's two seams, for interleavings that real Redis and HAProxy cannot be made to repeat.

Each waits until the test lets it go on, so an order of events is chosen, never hoped for.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from embedding_common.contract import Embedded, Lane, ModelCard
from embedding_service.api.routes import metric_labels
from embedding_service.cache.entry import Entry, pack, unpack
from embedding_service.cache.epoch import Epoch
from embedding_service.cache.lru import LRU
from embedding_service.core.catalog import Catalog
from embedding_service.core.embedder import Embedder
from embedding_service.core.fill import Fill, Landing
from embedding_service.core.query import Miss, Resolved
from embedding_service.core.singleflight import Flights
from embedding_service.errors import Unavailable
from embedding_service.observability.metrics import Metrics
from embedding_service.upstream.calls import Broken, Replicas
from embedding_service.upstream.ejection import Ejections
from embedding_service.upstream.lanes import Admission, Lanes
from embedding_service.upstream.retry import Retry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

DIMENSION = 4
CARD = ModelCard("model", "print-1", DIMENSION, 16, prompts={"query": "query: "})
OTHER_CARD = ModelCard("model", "print-2", DIMENSION, 16, prompts={"query": "query: "})


def model(text: str, card: ModelCard, prompt: str = "", direction: str = "right") -> NDArray[np.float32]:
    """A model small enough to know by heart: every text, prompt, side and fingerprint has a vector of its own."""
    digest = hashlib.blake2b(f"{text}\x00{card.fingerprint}\x00{prompt}\x00{direction}".encode(), digest_size=DIMENSION)
    return np.frombuffer(digest.digest(), np.uint8).astype(np.float32)


def token_count(text: str) -> int:
    return len(text.split()) + 2


def embedded(texts: Sequence[str], card: ModelCard, prompt: str = "", direction: str = "right") -> Embedded:
    tokens = np.array([token_count(text) for text in texts], np.int32)
    vectors = np.stack([model(text, card, prompt, direction) for text in texts])
    return Embedded(card, vectors, tokens, tokens > card.max_tokens)


@dataclass
class Call:
    """One call upstream that waits for the test to end it."""

    body: dict[str, Any]
    headers: Mapping[str, str]
    reply: asyncio.Future[tuple[int, dict[str, str], bytes]] = field(default_factory=asyncio.Future)

    @property
    def texts(self) -> list[str]:
        return list(self.body["texts"])

    def answer(self, card: ModelCard = CARD) -> None:
        prompt = card.prompt(self.body.get("prompt_name"))
        result = embedded(self.texts, card, prompt, self.body.get("truncation_direction", "right"))
        self.send(200, result.to_bytes())

    def answer_json(self, status: int, **body: object) -> None:
        self.send(status, orjson.dumps(body))

    def send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        if not self.reply.done():
            self.reply.set_result((status, headers or {}, body))

    def break_off(self) -> None:
        if not self.reply.done():
            self.reply.set_exception(Broken(Unavailable("the connection broke")))


class FakeBalancer:
    """Where HAProxy would be. `answers_at_once` is for tests that are about something else."""

    def __init__(self) -> None:
        self.card: ModelCard | None = CARD
        self.others: dict[str, ModelCard] = {}  # further models
        self.loaded: set[str] = set()  # those of them that have been asked for
        self.listed: bytes | None = None  # what `/models` says instead
        self.list_headers: dict[str, str] = {}  # of `/models`
        self.answers_at_once = False
        self.fails_with: tuple[int, bytes] | None = None
        self.waiting: list[Call] = []
        self.sent: list[Call] = []

    async def request(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[int, Mapping[str, str], bytes]:
        if path == "/models":
            if self.card is None:
                raise Unavailable("no replica")
            return 200, self.list_headers, self.listed or self._listed(self.card)
        if path == "/tokenize":
            return 200, {}, _tokenized(orjson.loads(body or b"{}"))
        call = Call(orjson.loads(body or b"{}"), headers)
        self.sent.append(call)
        if self.fails_with is not None:
            call.send(*self.fails_with)
        elif self.answers_at_once:
            name = call.body["model_id"]
            self.loaded.add(name)
            call.answer(self.others.get(name, self.card or CARD))
        self.waiting.append(call)
        try:
            return await call.reply
        finally:
            self.waiting.remove(call)

    def _listed(self, default: ModelCard) -> bytes:
        ready = {default.id, *self.loaded}
        models = [
            {"id": card.id, "state": "ready", "card": asdict(card)} if card.id in ready
            else {"id": card.id, "state": "unloaded", "card": None}
            for card in (default, *self.others.values())
        ]  # fmt: skip
        return orjson.dumps({"default": default.id, "models": models})


def _tokenized(body: Mapping[str, Any]) -> bytes:
    """Words are tokens, and one special token stands before them if wanted."""
    items = []
    for text in body["texts"]:
        words = [(match.group(), match.span()) for match in re.finditer(r"\S+", text)]
        found = [("[CLS]", None)] * body["add_special_tokens"] + words
        items.append(
            {
                "ids": list(range(len(found))),
                "tokens": [token for token, _ in found],
                "offsets": [span for _, span in found],
                "special": [span is None for _, span in found],
            }
        )
    return orjson.dumps({"model": body["model_id"], "texts": items})


class FakeStore:
    """Where Redis would be: keeps packed entries by epoch and key. Reads wait at a gate while `gated`."""

    def __init__(self, clock: Callable[[], float], epoch: Epoch) -> None:
        self.enabled = True
        self.connected = True
        self.gated = False
        self.epoch = 0  # as Redis has it
        self._epoch = epoch  # as the gateway has it
        self.kept: dict[tuple[int, bytes], bytes] = {}
        self.cards: list[ModelCard] = []
        self.reads: list[asyncio.Future[bool]] = []
        self._clock = clock

    async def get_many(self, epoch: int, keys: Sequence[bytes]) -> dict[bytes, Entry]:
        if self.gated:
            gate: asyncio.Future[bool] = asyncio.Future()
            self.reads.append(gate)
            try:
                if not await gate:
                    return {}
            finally:
                self.reads.remove(gate)
        if self.epoch > epoch:
            self._epoch.raise_to(self.epoch)
            return {}
        found = {key: unpack(key, self.kept.get((epoch, key), b"")) for key in keys}
        return {key: entry for key, entry in found.items() if entry is not None and entry.expires_at > self._clock()}

    def put_soon(self, epoch: int, entries: Iterable[tuple[bytes, Entry]]) -> None:
        if self.connected:
            self.kept.update({(epoch, key): pack(key, entry) for key, entry in entries})

    async def clear(self) -> int | None:
        self.epoch = self._epoch.current
        count = len(self.kept)
        self.kept.clear()
        return count

    def beat(self) -> None:
        """What the heartbeat does: writes the gateway's epoch if that is later."""
        self.epoch = max(self.epoch, self._epoch.current)

    async def remember(self, cards: Sequence[ModelCard]) -> None:
        self.cards = list(cards)

    async def recall(self) -> list[ModelCard]:
        return self.cards


class Gateway:
    """The real path between the two fakes."""

    def __init__(
        self,
        *,
        l1_entries: int = 100,
        calls: int = 2,
        chunk_bytes: int = 64,
        max_texts: int = 8192,
        max_body_bytes: int = 1 << 20,
        max_pending_bytes: int = 10_000,
        upstream_timeout_s: float = 30,
    ) -> None:
        self.now = 1_000_000.0  # of the wall clock; moved by tests
        clock = lambda: self.now  # noqa: E731
        self.metrics = Metrics(routes=metric_labels())
        self.balancer = FakeBalancer()
        self.l1 = LRU[Entry](max_entries=l1_entries, clock=clock)
        self.epoch = Epoch(forget=self.l1.clear, cell=self.metrics.board.epoch_cell)
        self.store = FakeStore(clock, self.epoch)
        self.admission = Admission(max_pending_bytes=dict.fromkeys(Lane, max_pending_bytes))
        self.retry = Retry(ejections=Ejections(), metrics=self.metrics, pause_s=0)
        self.replicas = Replicas(
            balancer=self.balancer,  # type: ignore[arg-type]  # one method is all that is used
            retry=self.retry,
            timeout_s=upstream_timeout_s,
        )
        self.catalog = Catalog(
            fetch=self.replicas.models,
            probe=self.replicas.probe,
            recall=self.store.recall,
            remember=self.store.remember,
            aliases={"alias": "model", "text-embedding-3-small": "", "lost": "gone"},
        )
        self.flights = Flights[Miss, Resolved](on_settled=self.admission.release_flight)
        self.landing = Landing(
            l1=self.l1,
            l1_ttl_s=100,
            flights=self.flights,
            store=self.store,
            catalog=self.catalog,
            epoch=self.epoch,
            clock=clock,
        )
        self.lanes = Lanes(
            replicas=self.replicas,
            retry=self.retry,
            settle=self.landing.settle,
            chunk_bytes=chunk_bytes,
            max_texts=max_texts,
            max_body_bytes=max_body_bytes,
            calls=dict.fromkeys(Lane, calls),
            call_timeout_s=upstream_timeout_s,
            admission=self.admission,
            metrics=self.metrics,
        )
        self.fill = Fill(
            landing=self.landing, store=self.store, upstream=self.lanes, epoch=self.epoch, metrics=self.metrics
        )
        self.embedder = Embedder(
            l1=self.l1,
            epoch=self.epoch,
            flights=self.flights,
            fill=self.fill,
            entry_ttl_s=1000,
            admission=self.admission,
            upstream=self.lanes,
            catalog=self.catalog,
            metrics=self.metrics,
        )
        self.catalog.adopt(CARD)

    async def clear_cache(self) -> None:
        self.epoch.begin()
        await self.store.clear()

    async def close(self) -> None:
        await self.fill.__aexit__()
        await self.lanes.__aexit__()


async def settle() -> None:
    """Lets everything that can go on without a gate go on."""
    for _ in range(30):
        await asyncio.sleep(0)
