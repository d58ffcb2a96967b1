"""Who is ejected, who is named instead, and how one comes back: by a clock that the test moves."""

from __future__ import annotations

import pytest

from embedding_service.upstream.ejection import EJECT_AFTER, FIRST_PAUSE_S, LOOK_AROUND_S, MAX_PAUSE_S, Ejections


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def three(clock: Clock) -> Ejections:
    """Three replicas, of which each has answered well."""
    ejections = Ejections(clock)
    for name in ("a", "b", "c"):
        ejections.usable(name)
    return ejections


def eject(ejections: Ejections, name: str) -> None:
    for _ in range(EJECT_AFTER):
        ejections.unusable(name)


def choose(ejections: Ejections, *, may_try: bool = True) -> str | None:
    """A call that is over at once."""
    name = ejections.choose(may_try=may_try)
    if name is not None:
        ejections.done(name)
    return name


def test_nobody_is_named_while_all_is_well(three: Ejections) -> None:
    assert {choose(three) for _ in range(5)} == {None}


def test_one_unusable_reply_is_an_accident(three: Ejections) -> None:
    for _ in range(10):
        three.unusable("a")
        three.usable("a")
    assert len(three) == 0


def test_the_repetition_goes_to_another_by_name(three: Ejections) -> None:
    three.unusable("a")
    assert {three.choose(avoid="a") for _ in range(4)} == {"b", "c"}


def test_while_one_is_ejected_the_others_are_named_in_turn(three: Ejections) -> None:
    eject(three, "a")
    assert [choose(three) for _ in range(4)] == ["b", "c", "b", "c"]


def test_the_one_with_the_fewest_calls_in_hand_is_named(three: Ejections) -> None:
    eject(three, "a")
    held = [three.choose() for _ in range(4)]
    three.done("c")
    three.done("c")
    assert held == ["b", "c", "b", "c"]
    assert [three.choose() for _ in range(3)] == ["c", "c", "b"]


def test_the_last_good_one_is_never_ejected(three: Ejections) -> None:
    for name in ("a", "b", "c"):
        eject(three, name)
    assert len(three) == 2
    assert choose(three) is None, "nobody is known to be good: HAProxy chooses"


def test_one_alone_is_never_ejected(clock: Clock) -> None:
    alone = Ejections(clock)
    eject(alone, "a")
    assert len(alone) == 0
    assert alone.choose(avoid="a") is None


def test_the_ejected_one_is_tried_by_one_call_after_a_pause_that_grows(three: Ejections, clock: Clock) -> None:
    eject(three, "a")
    tried_after = []
    for _ in range(2000):
        clock.now += 0.1
        if choose(three) == "a":
            tried_after.append(round(clock.now - 1000, 1))
            three.unusable("a")
    assert tried_after[:5] == [pytest.approx(FIRST_PAUSE_S * (2**n - 1), abs=0.5) for n in range(1, 6)]
    assert tried_after[-1] - tried_after[-2] == pytest.approx(MAX_PAUSE_S, abs=0.5)


def test_a_call_that_cannot_be_repeated_tries_nobody(three: Ejections, clock: Clock) -> None:
    eject(three, "a")
    clock.now += 100
    assert {choose(three, may_try=False) for _ in range(4)} == {"b", "c"}


def test_a_good_answer_brings_it_back(three: Ejections, clock: Clock) -> None:
    eject(three, "a")
    clock.now += FIRST_PAUSE_S
    assert choose(three) == "a"
    three.usable("a")
    assert {choose(three) for _ in range(5)} == {None}


@pytest.mark.parametrize(("well_for_s", "pause_s"), [(1, 2 * 2 * FIRST_PAUSE_S), (MAX_PAUSE_S, FIRST_PAUSE_S)])
def test_a_relapse_soon_is_paused_for_longer(three: Ejections, clock: Clock, well_for_s: float, pause_s: float) -> None:
    eject(three, "a")
    clock.now += FIRST_PAUSE_S
    choose(three)
    three.usable("a")
    clock.now += well_for_s
    eject(three, "a")
    clock.now += pause_s - 0.01
    assert choose(three) != "a"
    clock.now += 0.02
    assert choose(three) == "a"


def test_replicas_that_came_meanwhile_are_found_and_used(three: Ejections, clock: Clock) -> None:
    eject(three, "a")
    clock.now += LOOK_AROUND_S
    assert choose(three) == "a"
    assert choose(three) is None, "HAProxy chooses: one that nobody names has least in hand"
    three.usable("new")
    assert {choose(three) for _ in range(3)} == {"b", "c", "new"}


def test_one_that_is_gone_is_forgotten_and_naming_ends_with_it(three: Ejections, clock: Clock) -> None:
    eject(three, "a")
    clock.now += FIRST_PAUSE_S
    assert three.choose(may_try=True) == "a"
    three.forget("a")
    three.done("a")
    assert choose(three) is None
    assert "a" not in repr(three).split(":")[0].split("of")[1]
