from __future__ import annotations

from embedding_service.observability.log_throttle import MAX_LINES, WITHIN_S, LogThrottle


def test_a_fault_that_lasts_is_told_a_few_times_and_what_is_left_out_is_counted() -> None:
    now = 0.0
    lines: list[str] = []
    tell = LogThrottle(lambda message, *args: lines.append(message % args), lambda: now)
    for number in range(1000):
        tell("number %d", number)
    assert lines == [f"number {number}" for number in range(MAX_LINES)]
    now = WITHIN_S
    tell("number %d", 1000)
    left_out = f"{1000 - MAX_LINES} more lines like the next one were left out, the first {WITHIN_S:.0f} s ago"
    assert lines[MAX_LINES:] == [left_out, "number 1000"]
