"""The path of a text: key -> L1 -> flights -> fill (L2 -> upstream). Start at `Embedder.embed`.

Look-up and claim are one synchronous block. The reply is put together from the values in hand, by key, never from a
second look-up, so what a merge can get wrong (another text's vector with status 200) cannot happen here.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from embedding_common.contract import TIMEOUT_HEADER, Lane
from embedding_service.core.fill import Landed
from embedding_service.core.query import Answer, Ask, Miss
from embedding_service.core.singleflight import Ended, Flight, Ticket
from embedding_service.errors import ClientGone, DeadlineExceeded, StartOver
from embedding_service.observability.metrics import Outcome

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from embedding_common.contract import ModelCard
    from embedding_service.cache.entry import Entry, KeySpace
    from embedding_service.cache.lru import LRU
    from embedding_service.core.admission import Admission
    from embedding_service.core.audit import Drift
    from embedding_service.core.catalog import Catalog
    from embedding_service.core.fill import Fill, TextFlight, Upstream
    from embedding_service.core.singleflight import Flights
    from embedding_service.observability.metrics import Metrics

log = logging.getLogger(__name__)

LEAST_TIME_S = 0.005  # less is not worth a second look; also more than a timer of the loop may fire early
CHARS_PER_TOKEN = 6  # generous: a model that truncates at n tokens reads no more of a text than this times n


class Embedder:
    """Answers requests from L1, from flights under way, from L2, or by claiming what is missing.

    `drift`, if there is one, checks a hit now and then.
    """

    def __init__(
        self,
        *,
        l1: LRU[Entry],
        flights: Flights[Miss, Landed],
        fill: Fill,
        entry_ttl_s: float,
        admission: Admission,
        upstream: Upstream,
        catalog: Catalog,
        metrics: Metrics,
        drift: Drift | None = None,
    ) -> None:
        self._l1 = l1
        self._flights = flights
        self._fill = fill
        self._entry_ttl_s = entry_ttl_s
        self._admission = admission
        self._upstream = upstream
        self._catalog = catalog
        self._metrics = metrics
        self._drift = drift

    def __repr__(self) -> str:
        return f"<Embedder {self._l1!r}, {len(self._flights)} flights, {self._fill!r}>"

    async def embed(self, ask: Ask) -> Answer:
        """Vectors for all texts of `ask`, under one fingerprint. Raises `Problem`; never answers in part."""
        in_hand: dict[bytes, Landed] = {}
        try:
            try:
                return await self._attempt(ask, in_hand)
            except StartOver as first:
                # Whose own time is over must not claim again: that flight would end at once, under those who join it.
                if ask.deadline - time.monotonic() < LEAST_TIME_S:
                    raise first.problem from None
                self._metrics.start_overs.inc()
                log.info("request_id=%s starts over: %s", ask.request_id, first)
            try:
                return await self._attempt(ask, in_hand)
            except StartOver as second:
                raise second.problem from None
        except BaseException:
            self._metrics.count_failed(len(ask.texts))
            raise

    async def _attempt(self, ask: Ask, in_hand: dict[bytes, Landed]) -> Answer:
        self._fill.catch_up()
        card = self._catalog.card(ask.model_id) or await self._catalog.learn(ask.model_id, deadline=ask.deadline)
        space = self._catalog.space(card, ask.prompt_name, ask.direction)
        names = space.names(ask.texts)
        if not (ask.bypass or in_hand) and (entries := self._l1.get_all(names)) is not None:
            return self._answer(ask, card, space, entries, [Outcome.L1] * len(entries))
        keys = space.keys(ask.texts)
        joined, missing = self._look_up(ask, card, space, names, keys, in_hand)
        if joined or missing:
            await self._wait(ask, *self._take_off(ask, joined, missing), in_hand)
        return self._put_together(ask, card, space, keys, in_hand)

    # --- synchronous from here to the claim: nothing can come between looking and claiming ---

    def _look_up(
        self,
        ask: Ask,
        card: ModelCard,
        space: KeySpace,
        names: Sequence[Hashable],
        keys: list[bytes],
        in_hand: dict[bytes, Landed],
    ) -> tuple[dict[bytes, TextFlight], dict[bytes, Miss]]:
        """Sorts each distinct key: into `in_hand`, in the air (to be joined), or missing (to be claimed)."""
        joined: dict[bytes, TextFlight] = {}
        missing: dict[bytes, Miss] = {}
        for name, key, text in zip(names, keys, ask.texts, strict=True):
            if key in in_hand or key in missing:
                continue
            if not ask.bypass:
                if (entry := self._l1.get(name)) is not None:
                    in_hand[key] = Landed(entry, Outcome.L1)
                    continue
                if (flight := self._flights.find(key)) is not None:
                    joined[key] = flight
                    continue
            work_bytes = min(len(text), card.max_tokens * CHARS_PER_TOKEN) + 1
            missing[key] = Miss(text, space, work_bytes, ask.lane, ask.request_id, self._fill.epoch)
        return joined, missing

    def _take_off(
        self, ask: Ask, joined: dict[bytes, TextFlight], missing: dict[bytes, Miss]
    ) -> tuple[Ticket, dict[bytes, TextFlight], dict[bytes, TextFlight]]:
        """Joins and claims. Room is reserved before the first flight is touched: a refused request leaves no trace."""
        if missing:
            self._admission.reserve(ask.lane, sum(miss.work_bytes for miss in missing.values()))
        ticket = Ticket(len(joined) + len(missing))
        ttl_s = self._entry_ttl_s if ask.ttl_s is None else ask.ttl_s
        for flight in joined.values():
            self._flights.join(flight, ticket, deadline=ask.deadline, ttl_s=ttl_s)
            if ask.lane is Lane.INTERACTIVE:
                self._upstream.promote(flight)
        enter = self._flights.fly_alone if ask.bypass else self._flights.claim
        claimed: dict[bytes, TextFlight] = {}
        for key, miss in missing.items():
            claimed[key] = Flight(key, miss, lane=ask.lane, deadline=ask.deadline, ttl_s=ttl_s)
            enter(claimed[key], ticket)
        if claimed:
            self._fill.start(list(claimed.values()), read=not ask.bypass)
        return ticket, joined, claimed

    async def _wait(
        self,
        ask: Ask,
        ticket: Ticket,
        joined: dict[bytes, TextFlight],
        claimed: dict[bytes, TextFlight],
        in_hand: dict[bytes, Landed],
    ) -> None:
        """Until all flights have landed; what did is in hand even if others failed. Raises their problem."""
        flights = joined | claimed
        try:
            ended = await ticket.wait(deadline=ask.deadline, gone=ask.caller_gone)
        finally:
            self._flights.leave(flights.values(), ticket)
            for key, flight in flights.items():
                if flight.value is not None:
                    in_hand[key] = Landed(flight.value.entry, Outcome.JOINED) if key in joined else flight.value
        if ended is Ended.GONE:
            raise ClientGone
        if ended is Ended.LATE:
            raise DeadlineExceeded(f"{TIMEOUT_HEADER}: the time allowed for this request is over", field=TIMEOUT_HEADER)
        failures = [flight.error for flight in flights.values() if flight.error is not None]
        if failures:  # a start over only if nothing worse happened, since it would meet that again
            raise min(failures, key=lambda failure: isinstance(failure, StartOver)).with_traceback(None)

    def _put_together(
        self, ask: Ask, card: ModelCard, space: KeySpace, keys: list[bytes], in_hand: dict[bytes, Landed]
    ) -> Answer:
        landed = [in_hand[key] for key in keys]
        outcomes = [one.outcome for one in landed]
        if len(set(keys)) < len(keys):  # a text sent twice is computed once: the second joined the first
            seen: set[bytes] = set()
            for place, key in enumerate(keys):
                if key in seen and outcomes[place] is Outcome.UPSTREAM:
                    outcomes[place] = Outcome.JOINED
                seen.add(key)
        return self._answer(ask, card, space, [one.entry for one in landed], outcomes)

    def _answer(
        self, ask: Ask, card: ModelCard, space: KeySpace, entries: list[Entry], outcomes: list[Outcome]
    ) -> Answer:
        answer = Answer(card, entries, outcomes)
        if self._drift is not None:
            self._drift.see(space, ask.texts, answer)
        self._metrics.count_answer(outcomes, answer.tokens, answer.truncated)
        return answer
