"""Replicas that die and freeze under load."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

import pytest
from local_stack.part import wait_until

from tests.system.faults.load import Load, fresh, percentile_ms
from tests.system.stack.client import fresh_texts

if TYPE_CHECKING:
    from collections.abc import Callable

    from local_stack.stack import LocalStack

    from tests.system.stack.client import Client

short = pytest.mark.stack
pytestmark = [pytest.mark.faults, pytest.mark.timeout(240)]

REFUSED_WITHIN_S = 1.0
BACK_WITHIN_S = 15.0
HELD_ADDED_MS = 4000
REQUESTS = 5000


def states(stack: LocalStack) -> list[str]:
    return list(stack.servers().values())


@short
def test_all_replicas_gone(stack: LocalStack, client: Client, figures: Callable[..., None]) -> None:
    known = fresh_texts(3)
    client.vectors(known)
    slowest = {200: 0.0, 503: 0.0}

    def ask(texts: list[str], status: int) -> None:
        began = time.monotonic()
        reply = client.embed(texts)
        slowest[status] = max(slowest[status], time.monotonic() - began)
        assert reply.status_code == status, reply.text
        assert status == 200 or int(reply.headers["retry-after"]) >= 1

    for replica in stack.replicas:
        replica.stop(signal.SIGKILL)
    for _ in range(20):  # from the moment they die until HAProxy knows, and after
        ask(known, 200)
        ask(fresh_texts(1), 503)
        time.sleep(0.05)
    stack.gateway.stop()
    stack.gateway.start()  # knows the model and the vectors from Redis
    stack.gateway.wait_ready()
    assert client.embed(known).json()["cached_count"] == 3
    ask(fresh_texts(1), 503)

    began = time.monotonic()
    for replica in stack.replicas:
        replica.start()
    wait_until(lambda: client.embed(fresh_texts(1)).status_code == 200, "misses are answered again", timeout_s=90)
    figures(
        "all replicas gone",
        cached_200_within=f"{1000 * slowest[200]:.0f} ms",
        uncached_503_within=f"{1000 * slowest[503]:.0f} ms",
        computing_again_after=f"{time.monotonic() - began:.1f} s",
    )
    assert slowest[503] <= REFUSED_WITHIN_S


@short
def test_a_replica_killed_under_load(stack: LocalStack, figures: Callable[..., None]) -> None:
    victim = stack.replicas[1]
    with Load(stack.url, callers=8) as load:
        wait_until(lambda: len(load) > 200, "load is on", timeout_s=60)
        killed_at = time.monotonic()
        victim.send(signal.SIGKILL)
        wait_until(lambda: victim.restarted_at is not None, "it is started again", timeout_s=5)
        wait_until(lambda: stack.servers()[victim.name] != "UP", "HAProxy has noticed", timeout_s=10)
        wait_until(victim.ready, "it listens again", timeout_s=90)
        returned_at, given = time.monotonic(), stack.given()
        wait_until(
            lambda: (now := stack.given()) != {} and all(now[name] > given[name] for name in now),
            "traffic on three",
            timeout_s=30,
        )
        back_s = time.monotonic() - returned_at
        wait_until(lambda: len(load) >= REQUESTS, f"{REQUESTS} requests", timeout_s=60)
    figures(
        "kill -9 of a replica",
        requests=len(load),
        failed=load.failed,
        slowest_near_it=f"{percentile_ms(load.during(killed_at, killed_at + 3), 100):.0f} ms",
        on_three_after=f"{back_s:.1f} s",
    )
    assert load.failed == 0, load.statuses
    assert back_s <= BACK_WITHIN_S


def test_two_of_three_replicas_killed_at_once(stack: LocalStack, figures: Callable[..., None]) -> None:
    with Load(stack.url, callers=4) as load:
        wait_until(lambda: len(load) > 200, "load is on", timeout_s=60)
        for victim in stack.replicas[:2]:
            victim.send(signal.SIGKILL)
        before = len(load)
        wait_until(lambda: states(stack).count("UP") == 1, "HAProxy has noticed", timeout_s=10)
        wait_until(lambda: len(load) > before + 200, "load goes on", timeout_s=60)
    figures("kill -9 of two of three at once", requests=len(load), failed=load.failed)
    assert load.failed == 0, load.statuses


@short
def test_a_replica_frozen_under_load(stack: LocalStack, figures: Callable[..., None]) -> None:
    frozen = stack.replicas[2]
    with Load(stack.url, callers=8, make=fresh(2)) as load:
        wait_until(lambda: len(load) > 300, "load is on", timeout_s=60)
        frozen_at = time.monotonic()
        usual_ms = percentile_ms(load.samples[50:], 99)
        frozen.send(signal.SIGSTOP)
        wait_until(lambda: stack.servers()[frozen.name] == "DOWN", "HAProxy has noticed", timeout_s=20, every_s=0.02)
        down_at = time.monotonic()
        time.sleep(2)
        frozen.send(signal.SIGCONT)
        wait_until(lambda: stack.servers()[frozen.name] == "UP", "it is in service again", timeout_s=20)
    # it held at most as many requests as there are callers: one in a hundred would not show them
    added_ms = percentile_ms(load.during(frozen_at, down_at), 100) - usual_ms
    figures(
        "SIGSTOP of a replica",
        requests=len(load),
        failed=load.failed,
        usual_p99=f"{usual_ms:.0f} ms",
        most_added_to_what_it_held=f"{added_ms:.0f} ms",
        noticed_after=f"{down_at - frozen_at:.1f} s",
    )
    assert load.failed == 0, load.statuses
    assert added_ms <= HELD_ADDED_MS
