"""Which models answer, by the cards that replicas showed last: in their replies, in `/models`, and kept in Redis."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Literal

from embedding_common.contract import TIMEOUT_HEADER
from embedding_service.cache.entry import KeySpace
from embedding_service.core.singleflight import NEVER
from embedding_service.errors import DeadlineExceeded, Problem, Unavailable, UnknownModel

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping
    from typing import Self

    from embedding_common.contract import ModelCard, ModelList

log = logging.getLogger(__name__)

POLL_S = 5.0  # while all is well; each poll is a request that one replica answers
POLL_FAST_S = 0.5  # while no model is known, or no replica answers
RETRY_AFTER_S = 2.0
MAX_SPACES = 64  # kinds of request (fingerprints x prompts x truncation sides) before those of the past are forgotten
DEFAULT_NAMES = frozenset({"", "default"})  # an alias may name the default model so instead of by its own id
_QUOTED_CHARS = 80


class Catalog:
    """The models' cards by every name they answer to, and whether replicas can be reached. Owns the poll.

    `fetch` asks a replica which models there are, `probe` has one computed, so that its card is known. `recall` and
    `remember` keep the cards in Redis, so that a gateway which starts while no replica is up still knows under which
    fingerprints its cached texts lie. Both carry the default model first.
    """

    def __init__(
        self,
        *,
        fetch: Callable[[], Awaitable[ModelList]],
        probe: Callable[[str], Awaitable[ModelCard]],
        recall: Callable[[], Awaitable[list[ModelCard]]],
        remember: Callable[[list[ModelCard]], Awaitable[None]],
        aliases: Mapping[str, str] | None = None,
        unknown: Literal["refuse", "default"] = "refuse",
    ) -> None:
        self.reachable = False
        self.states: dict[str, str] = {}  # model id -> what the replica that was asked last says; the default first
        self._fetch = fetch
        self._probe = probe
        self._recall = recall
        self._remember = remember
        self._aliases = dict(aliases or {})
        self._unknown = unknown
        self._default: str | None = None
        self.cards: dict[str, ModelCard] = {}  # by model id
        self.known: dict[tuple[str | None, str | None, str], tuple[ModelCard, KeySpace]] = {}
        """(model name, prompt name, truncation side) of requests -> the card and the key space that answer them."""
        self._named: dict[str | None, ModelCard] = {}  # every name whose card is known: what a request looks up
        self._spaces: dict[tuple[str, str | None, str, str], KeySpace] = {}
        self._probes: dict[str, asyncio.Task[ModelCard]] = {}
        self._poll_task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Catalog {len(self.cards)} of {len(self.states)} models known, default {self._default}>"

    async def __aenter__(self) -> Self:
        await self._refresh()
        self._poll_task = asyncio.create_task(self._poll())
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [task for task in (self._poll_task, *self._probes.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def current(self) -> ModelCard | None:
        """The default model's card."""
        return self._named.get(None)

    @property
    def aliases(self) -> list[str]:
        """Other names that lead to a model."""
        return [name for name in self._aliases if name not in self.states and self._find(name) is not None]

    def card(self, name: str | None) -> ModelCard | None:
        """The card of the model that a request names; None while only `learn` can tell.

        Raises `UnknownModel`, `Unavailable`.
        """
        return self._named.get(name) or self.cards.get(self._target(name))

    async def learn(self, name: str | None, *, deadline: float = NEVER) -> ModelCard:
        """The same card, after the model has been loaded if it has to be: that takes seconds, once for all waiters.

        `deadline` is on the monotonic clock. Raises `DeadlineExceeded` and whatever the replicas refuse with.
        """
        if (known := self.card(name)) is not None:
            return known
        model_id = self._target(name)
        task = self._probes.get(model_id)
        if task is None:
            task = self._probes[model_id] = asyncio.create_task(self._ask_for(model_id))
            task.add_done_callback(_mark_retrieved)  # its waiters may all have gone before it failed
        left_s = None if deadline == NEVER else max(0.0, deadline - time.monotonic())
        done, _ = await asyncio.wait((task,), timeout=left_s)
        if not done:
            raise DeadlineExceeded(f"{TIMEOUT_HEADER}: over while model {model_id} was loading", field=TIMEOUT_HEADER)
        return task.result()

    async def resolve(
        self, name: str | None, prompt_name: str | None, direction: str, *, deadline: float = NEVER
    ) -> tuple[ModelCard, KeySpace]:
        """The card and the key space of a kind of request. Raises what `learn` and `space` raise.

        It is kept in `known`, where the next request of the kind finds it, unless callers could make such names up.
        """
        card = self.card(name) or await self.learn(name, deadline=deadline)
        found = card, self.space(card, prompt_name, direction)
        if name in self._named:
            self.known[name, prompt_name, direction] = found
        return found

    def space(self, card: ModelCard, prompt_name: str | None, direction: str) -> KeySpace:
        """The key space of a kind of request. Raises `InvalidRequest` for a prompt that the model lacks."""
        prompt = card.prompt(prompt_name)  # part of the kind: a fingerprint does not cover what a prompt says
        kind = (card.fingerprint, prompt_name, prompt, direction)
        space = self._spaces.get(kind)
        if space is None:
            if len(self._spaces) >= MAX_SPACES:
                # those of models that are gone; the others are as few as models have prompts, and L1 needs them
                served = {known.fingerprint for known in self.cards.values()}
                self._spaces = {kind: kept for kind, kept in self._spaces.items() if kept.fingerprint in served}
            space = self._spaces[kind] = KeySpace(
                model_id=card.id,
                fingerprint=card.fingerprint,
                prompt_name=prompt_name,
                prompt=prompt,
                direction=direction,
            )
        return space

    def adopt(self, card: ModelCard) -> None:
        """Takes over the card that a replica just showed."""
        self.reachable = True
        if card != self.cards.get(card.id):
            log.info("model %s, fingerprint %s, %d dimensions", card.id, card.fingerprint, card.dimension)
            self._know([card], default=self._default or card.id, states=self.states | {card.id: "ready"})

    def lost(self) -> None:
        """A call upstream reached no replica."""
        self.reachable = False

    # --- private: names ---

    def _target(self, name: str | None) -> str:
        """The id of the model that a name leads to. Raises `UnknownModel`, or `Unavailable` while none is known."""
        if self._default is None:
            raise Unavailable("no model is known yet: no replica has answered", retry_after_s=RETRY_AFTER_S)
        if (found := self._find(name)) is not None:
            return found
        if name is None or self._unknown == "default":
            return self._default
        known = ", ".join(self.states)
        leads = f", an alias of {self._aliases[name]!r}," if name in self._aliases else ""
        raise UnknownModel(
            f"model_id: {name[:_QUOTED_CHARS]!r}{leads} is not served here; available: {known}",
            field="model_id",
            limit=known,
            value=name[:_QUOTED_CHARS],
        )

    def _find(self, name: str | None) -> str | None:
        """The id of a listed model by its own name or an alias; None is the default model's name."""
        if name in self.states:
            return name
        aim = None if name is None else self._aliases.get(name, name)
        if aim is None or (aim in DEFAULT_NAMES and name in self._aliases):
            return self._default
        return aim if aim in self.states else None

    def _know(self, cards: Iterable[ModelCard], *, default: str, states: Mapping[str, str]) -> None:
        """Takes over cards and the list of models, then names all of them anew."""
        self.cards |= {card.id: card for card in cards}
        self._default = default
        self.states = {default: states[default]} | dict(states)
        named: dict[str | None, ModelCard] = {name: self.cards[name] for name in self.states if name in self.cards}
        for alias in (None, *self._aliases):
            if (found := self._find(alias)) in self.cards:
                named[alias] = self.cards[found]
        if named != self._named:
            self._named, self.known = named, {}

    # --- private: asking ---

    async def _ask_for(self, model_id: str) -> ModelCard:
        try:
            card = await self._probe(model_id)
            self.adopt(card)
            return card
        finally:
            del self._probes[model_id]  # a failure is not kept: the next to ask tries anew

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_S if self.reachable else POLL_FAST_S)
            await self._refresh()

    async def _refresh(self) -> None:
        try:
            self._take(await self._fetch())
        except Problem as problem:
            if self.reachable:
                log.warning("no replica answers: %s", problem.message)
            self.lost()
        if self._default is None:
            recalled = await self._recall()
            if recalled and self._default is None:
                log.info("remembered in Redis: %s", ", ".join(f"{card.id} {card.fingerprint}" for card in recalled))
                states = dict.fromkeys((card.id for card in recalled), "remembered")
                self._know(recalled, default=recalled[0].id, states=states)
        elif self.current is not None:
            # each time: Redis may have been away, or have lost them, since the last
            await self._remember([self.cards[name] for name in self.states if name in self.cards])

    def _take(self, listed: ModelList) -> None:
        cards = [model.card for model in listed.models if model.card is not None]
        for card in cards:
            self.adopt(card)
        self.reachable = True
        self._know(cards, default=listed.default, states={model.id: model.state for model in listed.models})


def _mark_retrieved(task: asyncio.Task[ModelCard]) -> None:
    if not task.cancelled():
        task.exception()
