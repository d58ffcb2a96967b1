from __future__ import annotations

import pytest

from embedding_common.contract import Lane
from embedding_service.errors import BodyTooLarge, Overloaded
from embedding_service.upstream.lanes import Admission


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def admission(clock: Clock | None = None) -> Admission:
    return Admission(max_pending_bytes={Lane.INTERACTIVE: 10, Lane.BULK: 100}, clock=clock or Clock())


def test_bulk_never_takes_the_interactive_lanes_room() -> None:
    room = admission()
    room.reserve(Lane.BULK, 100)
    room.reserve(Lane.INTERACTIVE, 10)
    with pytest.raises(Overloaded):
        room.reserve(Lane.BULK, 1)


def test_released_room_can_be_taken_again() -> None:
    room = admission()
    room.reserve(Lane.BULK, 100)
    room.release(Lane.BULK, 60)
    room.reserve(Lane.BULK, 60)
    assert room.pending_bytes(Lane.BULK) == 100


def test_what_can_never_fit_is_refused_for_good() -> None:
    with pytest.raises(BodyTooLarge, match="at most 100 bytes of uncached text, got 101") as refused:
        admission().reserve(Lane.BULK, 101)
    assert (refused.value.limit, refused.value.value) == (100, 101)


def test_a_refusal_says_when_the_measured_rate_will_have_made_room() -> None:
    clock = Clock()
    room = admission(clock)
    room.reserve(Lane.BULK, 100)
    clock.now = 1.0
    room.drained(10)  # ten bytes a second
    with pytest.raises(Overloaded) as refused:
        room.reserve(Lane.BULK, 50)
    assert refused.value.retry_after_s == pytest.approx(5.0)


def test_idle_time_does_not_count_as_slowness() -> None:
    clock = Clock()
    room = admission(clock)
    clock.now = 3600.0
    room.drained(10)
    clock.now += 1
    room.drained(10)
    room.reserve(Lane.BULK, 100)
    with pytest.raises(Overloaded) as refused:
        room.reserve(Lane.BULK, 100)
    assert refused.value.retry_after_s == pytest.approx(10.0)
