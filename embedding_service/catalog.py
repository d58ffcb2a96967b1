"""Which model answers, by the card the replicas last showed: learnt from replies, from `/models`, and from Redis."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from embedding_service.entry import KeySpace
from embedding_service.errors import Problem, Unavailable
from ml_base.native import check_model

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Self

    from ml_base.wire import ModelCard

log = logging.getLogger(__name__)

POLL_S = 5.0  # while all is well; each poll is a request that one replica answers
POLL_FAST_S = 0.5  # while nothing is known, or nobody answers
RETRY_AFTER_S = 2.0
MAX_SPACES = 64  # kinds of request whose hash prefix is kept: fingerprints x prompts x truncation sides


class Catalog:
    """The current model card, and whether replicas can be reached. As a context manager it owns the poll.

    `fetch` asks the replicas, `recall` and `remember` keep the last card in Redis, so that a gateway which starts
    while no replica is up still knows under which fingerprint its cached texts lie.
    """

    def __init__(
        self,
        *,
        fetch: Callable[[], Awaitable[ModelCard]],
        recall: Callable[[], Awaitable[ModelCard | None]],
        remember: Callable[[ModelCard], Awaitable[None]],
    ) -> None:
        self.reachable = False
        self._fetch = fetch
        self._recall = recall
        self._remember = remember
        self._card: ModelCard | None = None
        self._spaces: dict[tuple[str, str | None, str], KeySpace] = {}
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self._refresh()
        self._task = asyncio.create_task(self._poll())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    @property
    def current(self) -> ModelCard | None:
        return self._card

    def card(self, model_id: str | None) -> ModelCard:
        """The card of the model that a request names. Raises `UnknownModel`, `Unavailable`."""
        if self._card is None:
            raise Unavailable("no model is known yet: no replica has answered", retry_after_s=RETRY_AFTER_S)
        check_model(model_id, [self._card.id])
        return self._card

    def space(self, card: ModelCard, prompt_name: str | None, direction: str) -> KeySpace:
        """Where the keys of a kind of request lie. Raises `InvalidRequest` for a prompt the model lacks."""
        kind = (card.fingerprint, prompt_name, direction)
        space = self._spaces.get(kind)
        if space is None:
            if len(self._spaces) >= MAX_SPACES:
                self._spaces.clear()
            space = self._spaces[kind] = KeySpace(
                model_id=card.id,
                fingerprint=card.fingerprint,
                prompt_name=prompt_name,
                prompt=card.prompt(prompt_name),
                direction=direction,
            )
        return space

    def adopt(self, card: ModelCard) -> None:
        """Takes what a replica just showed for the truth."""
        self.reachable = True
        if card != self._card:
            log.info("model %s, fingerprint %s, %d dimensions", card.id, card.fingerprint, card.dimension)
            self._card = card

    def lost(self) -> None:
        """A call upstream found nobody."""
        self.reachable = False

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_S if self.reachable else POLL_FAST_S)
            await self._refresh()

    async def _refresh(self) -> None:
        try:
            self.adopt(await self._fetch())
        except Problem as problem:
            if self.reachable:
                log.warning("no replica answers: %s", problem.message)
            self.lost()
        if self._card is None:
            recalled = await self._recall()
            if recalled is not None and self._card is None:
                log.info("model %s, fingerprint %s, remembered in Redis", recalled.id, recalled.fingerprint)
                self._card = recalled
        else:
            await self._remember(self._card)  # each time: Redis may have been away, or have lost it, since the last
