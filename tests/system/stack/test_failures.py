"""Parts that are stopped and started while the stack is in use (tests/system/faults has worse). Each leaves all up."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
from local_stack.part import wait_until

from tests.system.stack.client import Client, Load, fresh_texts, run_script
from tests.system.stack.running import mend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from local_stack.stack import LocalStack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]


@pytest.fixture(autouse=True)
def mended(stack: LocalStack) -> Iterator[None]:
    """Everything is up before and after each test."""
    yield
    mend(stack)


def redis_is(client: Client, *, connected: bool) -> Callable[[], bool]:
    return lambda: client.cache_stats()["l2"]["connected"] is connected


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


def test_a_killed_gateway_is_back_with_what_redis_holds(stack: LocalStack, client: Client) -> None:
    known = fresh_texts(4)
    client.vectors(known)
    wait_until(lambda: client.cache_stats()["l2"]["connected"], "Redis is in use", timeout_s=10)
    stack.gateway.send(signal.SIGKILL)
    wait_until(lambda: stack.gateway.pid is None or not stack.gateway.ready(), "it is gone", timeout_s=5, every_s=0.01)
    stack.gateway.wait_ready()
    assert client.embed(known).json()["cached_count"] == 4
