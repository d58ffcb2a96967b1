"""Single flight: one computation per key at a time. A request for a key that is in flight joins that flight.

This module knows no cache and does no I/O. Everything here is synchronous, so nothing interleaves within a call and no
lock is needed. A request is a waiter: it holds one `Ticket` over all the flights that it waits for, so it costs one
future a request, not one a text.

    flight  claimed -> (queued -> dispatched ->) settled, once, with a value or an error
    ticket  done when all its flights have settled, or when the first of them failed

A waiter that leaves takes its ticket out of its flights. A flight without waiters that has not been dispatched is
abandoned at once: it leaves the table, so that the next request claims its key anew. A dispatched flight is finished,
since its work is being paid for anyway.
"""

from __future__ import annotations

import asyncio
import enum
import math
import time
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

P = TypeVar("P")  # what a flight needs to compute its value
V = TypeVar("V")


NEVER = math.inf
"""The deadline of a request that set none."""


SOON_S = 0.02
"""How long a wait goes on without watching its caller: L2 has answered by then, and a caller who has hung up is
noticed early enough after it."""


class State(enum.Enum):
    """A flight only moves forward."""

    CLAIMED = enum.auto()
    QUEUED = enum.auto()  # handed to the upstream lanes, and not yet sent
    DISPATCHED = enum.auto()
    SETTLED = enum.auto()


class Ended(enum.Enum):
    """Why a wait is over."""

    LANDED = enum.auto()
    LATE = enum.auto()
    GONE = enum.auto()


class Flight(Generic[P, V]):
    """The computation of one key. Its deadline and lifetime are the most generous of its waiters' (see `join`)."""

    __slots__ = ("deadline", "error", "key", "lane", "payload", "state", "tickets", "ttl_s", "value")

    def __init__(self, key: bytes, payload: P, *, lane: str, deadline: float, ttl_s: float) -> None:
        self.key = key
        self.payload = payload
        self.lane = lane
        self.deadline = deadline
        self.ttl_s = ttl_s
        self.state = State.CLAIMED
        self.tickets: set[Ticket] = set()
        self.value: V | None = None
        self.error: Exception | None = None

    def __repr__(self) -> str:
        return f"<Flight {self.state.name.lower()} {self.lane} {len(self.tickets)} waiting>"


class Ticket:
    """The wait of one request: `landed` is done when nothing is left to wait for, or when a flight failed."""

    __slots__ = ("_left", "landed")

    def __init__(self, flights: int) -> None:
        self._left = flights
        self.landed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def wait(self, *, deadline: float, gone: Callable[[], Coroutine[None, None, None]] | None) -> Ended:
        """Waits until landed, until `deadline` on the monotonic clock, or until `gone()` returns: the first ends it."""
        await self._landing_soon(deadline)
        if self.landed.done():
            return Ended.LANDED
        watched: set[asyncio.Future[None]] = {self.landed}
        leaving = None if gone is None else asyncio.create_task(gone())
        if leaving is not None:
            watched.add(leaving)
        left_s = None if deadline == NEVER else max(0.0, deadline - time.monotonic())
        try:
            await asyncio.wait(watched, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if self.landed.done():
                return Ended.LANDED
            return Ended.GONE if leaving is not None and leaving.done() else Ended.LATE
        finally:
            if leaving is not None:
                leaving.cancel()

    async def _landing_soon(self, deadline: float) -> None:
        """Waits until landed, but not for long: a value from L2 need not pay for the watch over its caller."""
        loop = asyncio.get_running_loop()
        over: asyncio.Future[None] = loop.create_future()

        def end(_: object = None) -> None:
            if not over.done():
                over.set_result(None)

        timer = loop.call_later(min(SOON_S, max(0.0, deadline - time.monotonic())), end)
        self.landed.add_done_callback(end)
        try:
            await over
        finally:
            timer.cancel()
            self.landed.remove_done_callback(end)

    def _one_settled(self, *, failed: bool) -> None:
        self._left -= 1
        if (failed or self._left == 0) and not self.landed.done():
            self.landed.set_result(None)


class Flights(Generic[P, V]):
    """The table of flights. `on_settled` is called once for each flight, however it ends."""

    def __init__(self, *, on_settled: Callable[[Flight[P, V]], None]) -> None:
        self._table: dict[bytes, Flight[P, V]] = {}
        self._on_settled = on_settled

    def __len__(self) -> int:
        return len(self._table)

    def find(self, key: bytes) -> Flight[P, V] | None:
        """The flight that can be joined for `key`."""
        return self._table.get(key)

    def claim(self, flight: Flight[P, V], ticket: Ticket) -> None:
        """Enters a new flight under its key. Raises `ValueError` if the key is in flight already."""
        if flight.key in self._table:
            raise ValueError(f"{flight.key.hex()} is on its way already")
        self._table[flight.key] = flight
        flight.tickets.add(ticket)

    def fly_alone(self, flight: Flight[P, V], ticket: Ticket) -> None:
        """Like `claim`, but no other request can join: the caller asked for a fresh value of its own."""
        flight.tickets.add(ticket)

    def join(self, flight: Flight[P, V], ticket: Ticket, *, deadline: float, ttl_s: float) -> None:
        """Waits with others: the flight now has the latest deadline and the longest lifetime of all of them."""
        flight.tickets.add(ticket)
        flight.deadline = max(flight.deadline, deadline)
        flight.ttl_s = max(flight.ttl_s, ttl_s)

    def leave(self, flights: Iterable[Flight[P, V]], ticket: Ticket) -> None:
        """Takes a waiter out of its flights. A flight without waiters that is not dispatched is abandoned."""
        for flight in flights:
            flight.tickets.discard(ticket)
            if not flight.tickets and flight.state in (State.CLAIMED, State.QUEUED):
                self._settle(flight, failed=True)

    def resolve(self, flight: Flight[P, V], value: V) -> None:
        """Gives every waiter the value. A flight settles once; later calls do nothing."""
        if flight.state is not State.SETTLED:
            flight.value = value
            self._settle(flight, failed=False)

    def fail(self, flight: Flight[P, V], error: Exception) -> None:
        """Gives every waiter the error. A flight settles once; later calls do nothing."""
        if flight.state is not State.SETTLED:
            flight.error = error
            self._settle(flight, failed=True)

    def _settle(self, flight: Flight[P, V], *, failed: bool) -> None:
        flight.state = State.SETTLED
        if self._table.get(flight.key) is flight:  # one that flies alone is not in the table
            del self._table[flight.key]
        for ticket in flight.tickets:
            ticket._one_settled(failed=failed)  # noqa: SLF001 - the two classes are one mechanism
        flight.tickets.clear()
        self._on_settled(flight)
