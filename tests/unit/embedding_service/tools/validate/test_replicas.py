"""Whether every replica took part, by HAProxy's figures before and after."""

from __future__ import annotations

from embedding_service.tools.validate.replicas import Server, judge_replicas


def servers(**rows: tuple[str, int]) -> dict[str, Server]:
    return {name: Server(name, status, answered, answered) for name, (status, answered) in rows.items()}


def judged(before: dict[str, Server], after: dict[str, Server], expected: int = 3) -> tuple[bool | None, str]:
    check = judge_replicas(before, after, expected=expected)
    return check.passed, "\n".join([check.measured, *check.details])


def test_a_server_that_only_answered_before_the_run_took_no_part() -> None:
    before = servers(a=("UP", 5), b=("UP", 5), c=("UP", 5))
    passed, told = judged(before, servers(a=("UP", 9), b=("UP", 9), c=("UP", 5)))
    assert not passed
    assert "c: UP, but answered nothing" in told


def test_sessions_without_an_answer_are_no_part_in_it() -> None:
    dead = {"a": Server("a", "UP 1/2", 0, 40)}  # as HAProxy shows a dead server it redispatches from
    assert judged({}, dead, expected=1)[0] is False


def test_a_restarted_balancer_counts_from_zero() -> None:
    assert judged(servers(a=("UP", 900)), servers(a=("UP", 4)), expected=1)[0]


def test_empty_slots_of_a_server_template_are_no_replicas() -> None:
    after = servers(a=("UP", 5), b=("MAINT (resolution)", 0))
    assert judged({}, after, expected=1)[0]
    passed, told = judged({}, after, expected=3)
    assert not passed
    assert "2 more expected, but HAProxy knows of no such server" in told


def test_a_slot_whose_container_went_away_is_named() -> None:
    after = servers(a=("UP", 5), b=("MAINT (resolution)", 7))
    passed, told = judged(servers(a=("UP", 0), b=("UP", 7)), after, expected=2)
    assert not passed
    assert "b: MAINT (resolution), 0 requests" in told


def test_a_server_set_aside_on_purpose_fails_nothing_while_enough_take_part() -> None:
    passed, told = judged({}, servers(a=("UP", 5), b=("MAINT", 0)), expected=1)
    assert passed
    assert "not in service: b" in told


def test_more_replicas_than_expected_must_all_take_part() -> None:
    assert judged({}, servers(a=("UP", 5), b=("no check", 5)), expected=1)[0]
    assert judged({}, servers(a=("UP", 5), b=("UP", 0)), expected=1)[0] is False
