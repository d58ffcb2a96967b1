"""Parts that die, freeze or drain while the stack is in use. Every test leaves all parts up."""

from __future__ import annotations

import json
import signal
import time
from typing import TYPE_CHECKING

import orjson
import pytest
from local_part import wait_until

from tests.stack.client import Client, Load, fresh_texts, paragraphs, run_script, start_script

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from local_stack import LocalStack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]

PARAGRAPHS = 600
BACK_IN_SERVICE_S = 15
QUICK_S = 3.0
"""For answers that must not wait for a part that is gone; generous, since the machine is shared."""


@pytest.fixture(autouse=True)
def mended(stack: LocalStack) -> Iterator[None]:
    """Everything is up before and after each test."""
    yield
    for part in stack.parts:
        part.send(signal.SIGCONT)
        if part.pid is None:
            part.stop()
            part.start()
    stack.wait_ready()


def up(stack: LocalStack) -> int:
    return list(stack.servers().values()).count("UP")


def redis_is(client: Client, *, connected: bool) -> Callable[[], bool]:
    return lambda: client.cache_stats()["l2"]["connected"] is connected


def timed_embed(client: Client, texts: list[str]) -> tuple[int, float]:
    began = time.monotonic()
    return client.embed(texts).status_code, time.monotonic() - began


def test_a_replica_killed_during_a_run_costs_no_request_and_is_soon_back(
    stack: LocalStack, client: Client, tmp_path: Path
) -> None:
    source = tmp_path / "paragraphs.jsonl"
    source.write_bytes(b"\n".join(map(orjson.dumps, paragraphs(PARAGRAPHS))))
    victim = stack.replicas[1]
    with start_script("warm_cache.py", source, "--url", stack.url, "--json", "--restart") as run:
        wait_until(lambda: client.cache_stats()["total"]["misses"] > 64, "the run is under way", timeout_s=60)
        victim.send(signal.SIGKILL)
        wait_until(lambda: victim.restarted_at is not None, "it is started again", timeout_s=5)
        wait_until(lambda: up(stack) < 3, "HAProxy has noticed", timeout_s=10)
        wait_until(lambda: up(stack) == 3, "all replicas are in service", timeout_s=60)
        assert victim.restarted_at is not None
        back_after_s = time.monotonic() - victim.restarted_at
        out, err = run.communicate(timeout=280)
    assert run.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["failed"] == 0
    assert client.cache_stats()["total"]["failed"] == 0
    assert back_after_s < BACK_IN_SERVICE_S


def test_a_replica_that_drains_under_load_loses_nothing(stack: LocalStack) -> None:
    leaver = stack.replicas[0]
    with Load(stack) as load:
        wait_until(lambda: load.statuses[200] > 20, "load is on", timeout_s=60)
        assert leaver.stop() == 0
        leaver.start()
        wait_until(lambda: stack.servers()[leaver.name] == "UP", "it is in service again", timeout_s=60)
    assert set(load.statuses) == {200}


def test_with_two_replicas_down_validate_scaling_names_them(stack: LocalStack) -> None:
    for replica in stack.replicas[1:]:
        replica.stop()
    gone = [replica.name for replica in stack.replicas[1:]]
    wait_until(lambda: {stack.servers()[name] for name in gone} == {"DOWN"}, "HAProxy has noticed", timeout_s=10)
    code, out, err = run_script(
        "validate_scaling.py", "--url", stack.url, "--stats-url", stack.stats_url, "--requests", "12"
    )
    assert code == 1, out + err
    assert "ml-base-2: DOWN" in out
    assert "ml-base-3: DOWN" in out


def test_a_frozen_replica_costs_no_request(stack: LocalStack) -> None:
    frozen = stack.replicas[2]
    with Load(stack) as load:
        wait_until(lambda: load.statuses[200] > 20, "load is on", timeout_s=60)
        frozen.send(signal.SIGSTOP)
        wait_until(lambda: stack.servers()[frozen.name] == "DOWN", "HAProxy has noticed", timeout_s=20)
        answered = load.statuses[200]
        wait_until(lambda: load.statuses[200] > answered + 10, "load goes on", timeout_s=60)
        frozen.send(signal.SIGCONT)
        wait_until(lambda: stack.servers()[frozen.name] == "UP", "it is in service again", timeout_s=20)
    assert set(load.statuses) == {200}


def test_without_any_replica_cached_texts_are_served_and_others_refused_quickly(
    stack: LocalStack, client: Client
) -> None:
    known = fresh_texts(3)
    client.vectors(known)
    for replica in stack.replicas:
        replica.stop(signal.SIGKILL)
    assert client.embed(known).json()["cached_count"] == 3
    began = time.monotonic()
    refused = client.embed(fresh_texts(1))
    assert time.monotonic() - began < QUICK_S
    assert refused.status_code == 503
    assert refused.json()["error"]
    assert int(refused.headers["retry-after"]) >= 1

    # a gateway started now knows the model from Redis
    stack.gateway.stop()
    stack.gateway.start()
    stack.gateway.wait_ready()
    assert client.embed(known).json()["cached_count"] == 3

    for replica in stack.replicas:
        replica.start()
    wait_until(lambda: client.embed(fresh_texts(1)).status_code == 200, "misses are answered again", timeout_s=90)


def test_a_gateway_starts_without_redis_and_uses_it_when_it_comes(stack: LocalStack, client: Client) -> None:
    stack.gateway.stop()
    stack.redis.stop()
    stack.gateway.start()
    stack.gateway.wait_ready()
    texts = fresh_texts(4)
    assert client.embed(texts).status_code == 200
    assert client.embed(texts).json()["cached_count"] == 4
    assert redis_is(client, connected=False)()

    stack.redis.start()
    wait_until(redis_is(client, connected=True), "the gateway has found Redis", timeout_s=10)
    later = fresh_texts(4)
    client.vectors(later)
    stack.gateway.stop()  # what is only in L1 is lost
    stack.gateway.start()
    stack.gateway.wait_ready()
    assert client.embed(later).json()["cached_count"] == 4


def test_a_redis_that_dies_is_missed_by_nobody_and_used_again_when_it_is_back(
    stack: LocalStack, client: Client
) -> None:
    known = fresh_texts(4)
    client.vectors(known)
    stack.redis.stop(signal.SIGKILL)
    for texts in (known, fresh_texts(4)):
        status, took_s = timed_embed(client, texts)
        assert status == 200
        assert took_s < QUICK_S
    wait_until(redis_is(client, connected=False), "the gateway has noticed", timeout_s=5)
    assert client.send("GET", "/readyz").status_code == 200
    stack.redis.start()
    wait_until(redis_is(client, connected=True), "the gateway uses Redis again", timeout_s=10)


def test_a_frozen_redis_blocks_nobody(stack: LocalStack, client: Client) -> None:
    known = fresh_texts(4)
    client.vectors(known)
    stack.redis.send(signal.SIGSTOP)
    with Load(stack, callers=3) as load:
        for _ in range(10):
            status, took_s = timed_embed(client, known)  # from L1: the event loop never waits for Redis
            assert status == 200
            assert took_s < 1
        wait_until(lambda: load.statuses[200] >= 6, "misses are computed", timeout_s=20)
    assert set(load.statuses) == {200}
    stack.redis.send(signal.SIGCONT)
    wait_until(redis_is(client, connected=True), "the gateway uses Redis again", timeout_s=10)


def test_a_killed_gateway_is_back_with_what_redis_holds(stack: LocalStack, client: Client) -> None:
    known = fresh_texts(4)
    client.vectors(known)
    wait_until(lambda: client.cache_stats()["l2"]["connected"], "Redis is in use", timeout_s=10)
    stack.gateway.send(signal.SIGKILL)
    wait_until(lambda: stack.gateway.pid is None or not stack.gateway.ready(), "it is gone", timeout_s=5, every_s=0.01)
    stack.gateway.wait_ready()
    assert client.embed(known).json()["cached_count"] == 4
