"""Ten times the load that saturates the stack, and one person who searches meanwhile."""

from __future__ import annotations

import time
from statistics import mean
from typing import TYPE_CHECKING, Any

import pytest

from tests.system.faults.load import Load, percentile_ms
from tests.system.faults.processes import children, resident_mb
from tests.system.stack.client import fresh_texts, paragraphs

if TYPE_CHECKING:
    from collections.abc import Callable

    from local_stack.stack import LocalStack

pytestmark = [pytest.mark.faults, pytest.mark.timeout(240)]

TEXTS = 32
TEXT_CHARS = 200
SATURATING_CALLERS = 4  # 16 pieces of work at least, of which the gateway sends 8 at a time
TIMES = 10
PEAK_S = 8.0
OVERLOAD_S = 12.0
QUERY_EVERY_S = 0.05
LEAST_GOODPUT = 0.9
QUERY_P99_MS = 250
GROWTH_MB = 64  # of all processes together, over a run that fills L1 with some thousand vectors
HURRY_MS = 4000  # whoever comes last would wait seven seconds
HURRIED_GOODPUT = 0.7


def jobs() -> Callable[[], dict[str, Any]]:
    prose = [paragraph[:TEXT_CHARS] for paragraph in paragraphs(500)]

    def make() -> dict[str, Any]:
        return {"texts": [f"{prose[hash(text) % len(prose)]} {text}" for text in fresh_texts(TEXTS)]}

    return make


def texts_per_s(load: Load) -> float:
    """Answered, from the first request sent to the last reply."""
    began = min(sample.sent_at for sample in load.samples)
    ended = max(sample.over_at for sample in load.samples)
    return TEXTS * load.statuses[200] / (ended - began)


def memory_mb(stack: LocalStack) -> float:
    assert stack.gateway.pid is not None
    pids = [*children(stack.gateway.pid), *(replica.pid for replica in stack.replicas if replica.pid is not None)]
    return sum(map(resident_mb, pids))


def peak_texts_per_s(stack: LocalStack) -> float:
    """Texts answered in a second under the load that saturates."""
    with Load(stack.url, callers=SATURATING_CALLERS, make=jobs()) as load:
        time.sleep(PEAK_S)
    return texts_per_s(load)


def test_ten_times_the_load_that_saturates(stack: LocalStack, figures: Callable[..., None]) -> None:
    peaks = [peak_texts_per_s(stack)]  # before and after: a machine that others use too changes its pace meanwhile
    with (
        Load(stack.url, callers=1, every_s=QUERY_EVERY_S) as query,
        Load(stack.url, callers=TIMES * SATURATING_CALLERS, make=jobs()) as load,
    ):
        time.sleep(OVERLOAD_S / 2)
        before_mb = memory_mb(stack)
        time.sleep(OVERLOAD_S / 2)
        grown_mb = memory_mb(stack) - before_mb
    peaks.append(peak_texts_per_s(stack))
    goodput = texts_per_s(load) / mean(peaks)
    p99_ms = percentile_ms(query.samples, 99)
    figures(
        f"{TIMES} times the load that saturates",
        peak=f"{mean(peaks):.0f} texts/s",
        goodput=f"{100 * goodput:.0f} %",
        replies=dict(load.statuses),
        memory=f"{grown_mb:+.0f} MB",
        queries=dict(query.statuses),
        query_p50=f"{percentile_ms(query.samples, 50):.0f} ms",
        query_p99=f"{p99_ms:.0f} ms",
    )
    assert set(load.statuses) | set(query.statuses) <= {200, 429, 503}
    assert grown_mb < GROWTH_MB
    assert goodput >= LEAST_GOODPUT
    assert p99_ms <= QUERY_P99_MS


def test_ten_times_the_load_of_callers_who_cannot_wait(stack: LocalStack, figures: Callable[..., None]) -> None:
    """A queue in order gives the replicas' time to those who are about to leave: goodput was half of the peak."""
    hurry = {"x-request-timeout-ms": str(HURRY_MS)}
    peaks = [peak_texts_per_s(stack)]
    with Load(stack.url, callers=TIMES * SATURATING_CALLERS, make=jobs(), headers=hurry) as load:
        time.sleep(OVERLOAD_S)
    peaks.append(peak_texts_per_s(stack))
    goodput = texts_per_s(load) / mean(peaks)
    figures(f"the same, {HURRY_MS} ms each", goodput=f"{100 * goodput:.0f} %", replies=dict(load.statuses))
    assert set(load.statuses) <= {200, 429, 503, 504}
    assert goodput >= HURRIED_GOODPUT
