from __future__ import annotations

import time

import pytest

from embedding_service.core.singleflight import NEVER, Ended, Flight, Flights, State, Ticket


class Table:
    """Flights that note how often each settled."""

    def __init__(self) -> None:
        self.settled: list[bytes] = []
        self.flights = Flights[str, str](on_settled=lambda flight: self.settled.append(flight.key))

    def claim(self, *keys: bytes) -> tuple[Ticket, list[Flight[str, str]]]:
        ticket = Ticket(len(keys))
        claimed = [Flight[str, str](key, "payload", lane="bulk", deadline=5, ttl_s=1) for key in keys]
        for flight in claimed:
            self.flights.claim(flight, ticket)
        return ticket, claimed


async def test_everybody_who_joined_gets_the_value() -> None:
    table = Table()
    claimer, [flight] = table.claim(b"a")
    joiner = Ticket(1)
    table.flights.join(flight, joiner, deadline=1, ttl_s=0)
    table.flights.resolve(flight, "value")
    assert claimer.landed.done()
    assert joiner.landed.done()
    assert flight.value == "value"


async def test_a_key_on_its_way_cannot_be_claimed_again() -> None:
    table = Table()
    table.claim(b"a")
    with pytest.raises(ValueError, match="on its way"):
        table.claim(b"a")


async def test_a_settled_key_can_be_claimed_again() -> None:
    table = Table()
    _, [flight] = table.claim(b"a")
    table.flights.fail(flight, RuntimeError())
    table.claim(b"a")
    assert table.flights.find(b"a") is not flight


async def test_a_flight_settles_once() -> None:
    table = Table()
    _, [flight] = table.claim(b"a")
    table.flights.resolve(flight, "first")
    table.flights.resolve(flight, "second")
    table.flights.fail(flight, RuntimeError())
    assert (flight.value, flight.error, table.settled) == ("first", None, [b"a"])


async def test_a_ticket_lands_with_its_last_flight() -> None:
    table = Table()
    ticket, [one, two] = table.claim(b"a", b"b")
    table.flights.resolve(one, "1")
    assert not ticket.landed.done()
    table.flights.resolve(two, "2")
    assert ticket.landed.done()


async def test_a_ticket_lands_at_the_first_failure() -> None:
    table = Table()
    ticket, [one, _] = table.claim(b"a", b"b")
    table.flights.fail(one, RuntimeError())
    assert ticket.landed.done()


async def test_a_flight_nobody_waits_for_is_abandoned() -> None:
    table = Table()
    ticket, [flight] = table.claim(b"a")
    flight.state = State.QUEUED
    table.flights.leave([flight], ticket)
    assert flight.state is State.SETTLED
    assert table.flights.find(b"a") is None


async def test_a_flight_others_wait_for_goes_on_when_its_claimer_leaves() -> None:
    table = Table()
    claimer, [flight] = table.claim(b"a")
    joiner = Ticket(1)
    table.flights.join(flight, joiner, deadline=1, ttl_s=0)
    table.flights.leave([flight], claimer)
    assert table.flights.find(b"a") is flight


async def test_a_dispatched_flight_goes_on_when_everybody_leaves() -> None:
    table = Table()
    ticket, [flight] = table.claim(b"a")
    flight.state = State.DISPATCHED
    table.flights.leave([flight], ticket)
    assert table.flights.find(b"a") is flight
    table.flights.resolve(flight, "value")
    assert not ticket.landed.done(), "who left is not told"


async def test_joining_makes_terms_only_more_generous() -> None:
    table = Table()
    _, [flight] = table.claim(b"a")
    table.flights.join(flight, Ticket(1), deadline=NEVER, ttl_s=0)
    table.flights.join(flight, Ticket(1), deadline=1, ttl_s=60)
    assert (flight.deadline, flight.ttl_s) == (NEVER, 60)


async def test_who_flies_alone_is_never_joined() -> None:
    table = Table()
    flight = Flight[str, str](b"a", "payload", lane="bulk", deadline=5, ttl_s=1)
    table.flights.fly_alone(flight, Ticket(1))
    assert table.flights.find(b"a") is None
    _, [shared] = table.claim(b"a")
    table.flights.resolve(flight, "alone")
    assert table.flights.find(b"a") is shared


async def test_a_wait_ends_with_the_landing() -> None:
    table = Table()
    ticket, [flight] = table.claim(b"a")
    table.flights.resolve(flight, "value")
    assert await ticket.wait(deadline=NEVER, gone=None) is Ended.LANDED


async def test_a_wait_ends_at_its_deadline() -> None:
    ticket, _ = Table().claim(b"a")
    assert await ticket.wait(deadline=time.monotonic() - 1, gone=None) is Ended.LATE


async def test_a_wait_ends_when_the_caller_goes() -> None:
    async def gone() -> None:
        return

    ticket, _ = Table().claim(b"a")
    assert await ticket.wait(deadline=NEVER, gone=gone) is Ended.GONE
