"""The path of a text: key -> L1 -> flights -> fill (L2 -> upstream). Start at `Embedder.embed`.

Look-up and claim are one synchronous block. The reply is put together from the values in hand, by key, never from a
second look-up, so what a merge can get wrong (another text's vector with status 200) cannot happen here.
"""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING

from embedding_common.contract import TIMEOUT_HEADER, Lane
from embedding_service.core.query import Answer, Miss, Outcome, Resolved
from embedding_service.core.singleflight import Ended, Flight, Ticket
from embedding_service.errors import ClientGone, DeadlineExceeded, StartOver

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence
    from typing import Protocol

    from embedding_common.contract import ModelCard
    from embedding_service.cache.entry import Entry, KeySpace
    from embedding_service.cache.epoch import Epoch
    from embedding_service.cache.lru import LRU
    from embedding_service.core.audit import Audit
    from embedding_service.core.catalog import Catalog
    from embedding_service.core.fill import Fill, TextFlight, Upstream
    from embedding_service.core.query import Query
    from embedding_service.core.singleflight import Flights
    from embedding_service.observability.metrics import Metrics

    class Admission(Protocol):
        """The room that each lane has for text that is not computed yet."""

        def reserve(self, lane: Lane, work_bytes: int) -> None:
            """Raises `Overloaded`, or `BodyTooLarge` for work that can never fit."""


log = logging.getLogger(__name__)

LEAST_TIME_S = 0.005  # less is not worth a second look-up; also more than a timer of the loop may fire early
CHARS_PER_TOKEN = 6  # generous: a model that truncates at n tokens reads no more of a text than this times n


class Embedder:
    """Answers queries from L1, from flights under way, from L2, or by claiming what is missing.

    `audit`, if there is one, checks a cached text now and then.
    """

    def __init__(
        self,
        *,
        l1: LRU[Entry],
        epoch: Epoch,
        flights: Flights[Miss, Resolved],
        fill: Fill,
        entry_ttl_s: float,
        admission: Admission,
        upstream: Upstream,
        catalog: Catalog,
        metrics: Metrics,
        audit: Audit | None = None,
    ) -> None:
        self._l1 = l1
        self._epoch = epoch
        self._flights = flights
        self._fill = fill
        self._entry_ttl_s = entry_ttl_s
        self._admission = admission
        self._upstream = upstream
        self._catalog = catalog
        self._metrics = metrics
        self._audit = audit
        self._hits_to_audit = math.inf if audit is None else audit.draw_interval()

    def __repr__(self) -> str:
        return f"<Embedder {self._l1!r}, {len(self._flights)} flights, {self._fill!r}>"

    async def embed(self, query: Query) -> Answer:
        """Vectors for all texts of `query`, under one fingerprint. Raises `Problem`; never answers in part."""
        in_hand: dict[bytes, Resolved] = {}
        try:
            try:
                return await self._attempt(query, in_hand)
            except StartOver as first:
                # A query whose own time is over must not claim again: its flight would end at once, under its joiners.
                if query.deadline - time.monotonic() < LEAST_TIME_S:
                    raise first.problem from None
                self._metrics.start_overs.inc()
                log.info("request_id=%s starts over: %s", query.request_id, first)
            try:
                return await self._attempt(query, in_hand)
            except StartOver as second:
                raise second.problem from None
        except BaseException:
            self._metrics.count_failed(len(query.texts))
            raise

    async def _attempt(self, query: Query, in_hand: dict[bytes, Resolved]) -> Answer:
        kind = (query.model_id, query.prompt_name, query.direction)
        card, space = self._catalog.known.get(kind) or await self._catalog.resolve(*kind, deadline=query.deadline)
        epoch = self._epoch
        if epoch.cell[0] != epoch.current:  # a comparison, not a call: it is on the path of every cached text
            epoch.catch_up()
        names = space.names(query.texts)
        if not (query.bypass or in_hand) and (entries := self._l1.get_all(names)) is not None:
            return self._answer(query, card, space, entries, [Outcome.L1] * len(entries))
        keys = space.keys(query.texts)
        joined, missing = self._look_up(query, card, space, names, keys, in_hand)
        if joined or missing:
            await self._wait(query, *self._start_flights(query, joined, missing), in_hand)
        return self._put_together(query, card, space, keys, in_hand)

    # --- synchronous from here to the claim: nothing can come between looking and claiming ---

    def _look_up(
        self,
        query: Query,
        card: ModelCard,
        space: KeySpace,
        names: Sequence[Hashable],
        keys: list[bytes],
        in_hand: dict[bytes, Resolved],
    ) -> tuple[dict[bytes, TextFlight], dict[bytes, Miss]]:
        """Sorts each distinct key: into `in_hand`, into flights to be joined, or into misses to be claimed."""
        joined: dict[bytes, TextFlight] = {}
        missing: dict[bytes, Miss] = {}
        for name, key, text in zip(names, keys, query.texts, strict=True):
            if key in in_hand or key in missing:
                continue
            if not query.bypass:
                if (entry := self._l1.get(name)) is not None:
                    in_hand[key] = Resolved(entry, Outcome.L1)
                    continue
                if (flight := self._flights.find(key)) is not None:
                    joined[key] = flight
                    continue
            work_bytes = min(len(text), card.max_tokens * CHARS_PER_TOKEN) + 1
            missing[key] = Miss(text, space, work_bytes, query.lane, query.request_id, self._epoch.current)
        return joined, missing

    def _start_flights(
        self, query: Query, joined: dict[bytes, TextFlight], missing: dict[bytes, Miss]
    ) -> tuple[Ticket, dict[bytes, TextFlight], dict[bytes, TextFlight]]:
        """Joins and claims. Room is reserved before the first flight is touched: a refused query leaves no trace."""
        if missing:
            self._admission.reserve(query.lane, sum([miss.work_bytes for miss in missing.values()]))
        ticket = Ticket(len(joined) + len(missing))
        ttl_s = self._entry_ttl_s if query.ttl_s is None else query.ttl_s
        for flight in joined.values():
            self._flights.join(flight, ticket, deadline=query.deadline, ttl_s=ttl_s)
            if query.lane is Lane.INTERACTIVE:
                self._upstream.promote(flight)
        enter = self._flights.fly_alone if query.bypass else self._flights.claim
        claimed: dict[bytes, TextFlight] = {}
        for key, miss in missing.items():
            claimed[key] = Flight(key, miss, lane=query.lane, deadline=query.deadline, ttl_s=ttl_s)
            enter(claimed[key], ticket)
        if claimed:
            self._fill.start(list(claimed.values()), read=not query.bypass)
        return ticket, joined, claimed

    async def _wait(
        self,
        query: Query,
        ticket: Ticket,
        joined: dict[bytes, TextFlight],
        claimed: dict[bytes, TextFlight],
        in_hand: dict[bytes, Resolved],
    ) -> None:
        """Waits until all flights have landed. Those that did are in hand even if others failed.

        Raises the problem of those that failed.
        """
        flights = joined | claimed
        try:
            ended = await ticket.wait(deadline=query.deadline, gone=query.caller_gone)
        finally:
            self._flights.leave(flights.values(), ticket)
            for key, flight in flights.items():
                if flight.value is not None:
                    in_hand[key] = Resolved(flight.value.entry, Outcome.JOINED) if key in joined else flight.value
        if ended is Ended.GONE:
            raise ClientGone
        if ended is Ended.LATE:
            raise DeadlineExceeded(f"{TIMEOUT_HEADER}: the time allowed for this request is over", field=TIMEOUT_HEADER)
        failures = [flight.error for flight in flights.values() if flight.error is not None]
        if failures:  # a start over only if nothing worse happened, since it would meet that again
            raise min(failures, key=lambda failure: isinstance(failure, StartOver)).with_traceback(None)

    def _put_together(
        self, query: Query, card: ModelCard, space: KeySpace, keys: list[bytes], in_hand: dict[bytes, Resolved]
    ) -> Answer:
        resolved = [in_hand[key] for key in keys]
        outcomes = [one.outcome for one in resolved]
        if len(set(keys)) < len(keys):  # a text sent twice is computed once: the second joined the first
            seen: set[bytes] = set()
            for place, key in enumerate(keys):
                if key in seen and outcomes[place] is Outcome.UPSTREAM:
                    outcomes[place] = Outcome.JOINED
                seen.add(key)
        return self._answer(query, card, space, [one.entry for one in resolved], outcomes)

    def _answer(
        self, query: Query, card: ModelCard, space: KeySpace, entries: list[Entry], outcomes: list[Outcome]
    ) -> Answer:
        limit = card.max_tokens
        tokens = [entry.tokens for entry in entries]
        answer = Answer(
            card,
            entries,
            outcomes,
            tokens=sum(tokens) if max(tokens) <= limit else sum([min(read, limit) for read in tokens]),
            truncated=sum([entry.truncated for entry in entries]),
            cached=len(outcomes) - outcomes.count(Outcome.UPSTREAM),
        )
        self._hits_to_audit -= answer.cached
        if self._hits_to_audit <= 0 and self._audit is not None:
            self._hits_to_audit = self._audit.draw_interval()
            self._audit.start(space, query.texts, answer)
        self._metrics.count_answer(outcomes, answer.tokens, answer.truncated)
        return answer
