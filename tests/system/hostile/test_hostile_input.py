"""Thousands of requests that nobody should send, to a real gateway process: no 5xx, no hang, no growth.

All of them: HOSTILE_CASES=10000 scripts/test stack tests/system/hostile
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from typing import TYPE_CHECKING

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from tests.system.hostile.requests import anything
from tests.system.hostile.target import ANSWER_WITHIN_S, statuses

if TYPE_CHECKING:
    from schemathesis import Case

    from tests.system.hostile.target import Target

pytestmark = [pytest.mark.stack, pytest.mark.timeout(1800)]

CASES = int(os.environ.get("HOSTILE_CASES", "2000"))  # less than a minute
AT_ONCE = 40
MAX_GROWTH_BYTES = 64 << 20
"""Over all cases: allocator and caches of the gateway settle within this; a leak of 10 kB a case would not."""


class Tally:
    """What came of the cases of one test."""

    def __init__(self, target: Target) -> None:
        self.cases = 0
        self.replies: Counter[int] = Counter()
        self.slowest_s = 0.0
        self._target = target
        self._before_bytes = target.memory_bytes()

    def add(self, seen: list[int], took_s: float, *, cases: int = 1) -> None:
        self.cases += cases
        self.replies.update(seen)
        self.slowest_s = max(self.slowest_s, took_s)

    def line(self, name: str) -> str:
        replies = " ".join(f"{status}:{count}" for status, count in sorted(self.replies.items()))
        growth = self._growth_bytes() / (1 << 20)
        return f"{name:24}{self.cases:7} {self.slowest_s * 1000:6.0f} ms {growth:+6.1f} MB  {replies}"

    def check(self) -> None:
        assert not [status for status in self.replies if status >= 500]
        assert self._growth_bytes() < MAX_GROWTH_BYTES
        assert self._target.answers()
        assert "Traceback" not in self._target.log()

    def _growth_bytes(self) -> int:
        return self._target.memory_bytes() - self._before_bytes


def examples(count: int) -> settings:
    """So many, whatever hypothesis thinks of their speed; a failure is shown as it was found."""
    return settings(
        max_examples=max(1, count),
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def test_raw_bytes_get_no_5xx_and_leave_nothing_behind(target: Target, figures: list[str]) -> None:
    assert target.answers()
    tally = Tally(target)

    @examples(CASES * 6 // 10 // AT_ONCE)
    @given(st.lists(anything, min_size=AT_ONCE, max_size=AT_ONCE))
    def send(raws: list[bytes]) -> None:
        began = time.monotonic()
        for raw, reply in zip(raws, target.send_all(raws), strict=True):
            seen = statuses(reply)
            tally.add(seen, time.monotonic() - began)
            assert not [status for status in seen if status >= 500], (raw, reply)

    send()
    figures.append(tally.line("raw bytes"))
    tally.check()


@pytest.mark.parametrize("mode", schemathesis.GenerationMode)
def test_what_our_own_document_describes_gets_no_5xx(
    target: Target, figures: list[str], mode: schemathesis.GenerationMode
) -> None:
    schema = schemathesis.openapi.from_url(f"{target.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    varied = sum(bool(operation.body) for operation in operations)  # the others are what they are: one case each
    tally = Tally(target)
    session = requests.Session()
    for operation in operations:

        @examples(CASES * 2 // 10 // varied + 1)
        @given(operation.as_strategy(generation_mode=mode))
        def call(case: Case) -> None:
            reply = case.call(session=session, timeout=ANSWER_WITHIN_S)
            tally.add([reply.status_code], reply.elapsed)
            assert reply.status_code < 500, (case.as_curl_command(), reply.text)

        with contextlib.suppress(Unsatisfiable):  # where nothing is sent, nothing can be wrong about it
            call()
    session.close()
    figures.append(tally.line(f"our document, {mode.value}"))
    tally.check()
