"""Callers that take their time, against a real gateway process."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING

import pytest

from tests.system.hostile.target import LOOPBACK, Target, request, statuses

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.stack, pytest.mark.timeout(120)]

BODY_TIMEOUT_S = 2
HEAD_TIMEOUT_S = 10
SWEEPS_S = 2.5  # a sweep begins to count, a later one notices, and either may just have been missed
CALLERS = 200


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    env = {"BODY_TIMEOUT": str(BODY_TIMEOUT_S), "MAX_BODY_BYTES": "2000000"}
    with Target(tmp_path_factory.mktemp("slow"), env) as target:
        yield target


async def until_closed(target: Target, begin: bytes, *, byte_every_s: float = 0.2) -> tuple[bytes, float]:
    """The reply, and how long it took, to a caller that after `begin` sends a byte now and then."""
    reader, writer = await asyncio.open_connection(LOOPBACK, target.port)
    writer.write(begin)
    began = time.monotonic()
    reply = asyncio.create_task(reader.read())
    while not reply.done():
        writer.write(b"x")
        await asyncio.sleep(byte_every_s)
    writer.close()
    try:
        return await reply, time.monotonic() - began
    except ConnectionError:
        return b"", time.monotonic() - began


async def test_bodies_that_trickle_are_answered_with_408_while_others_are_served(target: Target) -> None:
    begin = request("/embed", b"", b"x: y").replace(b"content-length: 0", b"content-length: 100000")
    callers = [asyncio.create_task(until_closed(target, begin)) for _ in range(CALLERS)]
    await asyncio.sleep(1)
    assert await asyncio.to_thread(target.answers)
    for reply, took_s in await asyncio.gather(*callers):
        assert statuses(reply) == [408]
        assert json.loads(reply.partition(b"\r\n\r\n")[2])["error_type"] == "Timeout"
        assert took_s < BODY_TIMEOUT_S + SWEEPS_S


async def test_heads_that_trickle_and_silent_connections_are_closed(target: Target) -> None:
    reader, writer = await asyncio.open_connection(LOOPBACK, target.port)
    trickling = [until_closed(target, b"GET /embed HTTP/1.1\r\nx: ") for _ in range(20)]
    for reply, took_s in await asyncio.gather(*trickling):
        assert statuses(reply) == [408]
        assert took_s < HEAD_TIMEOUT_S + SWEEPS_S
    assert await asyncio.wait_for(reader.read(), SWEEPS_S) == b""
    writer.close()


async def test_half_a_request_and_gone_leaves_nothing_behind(target: Target) -> None:
    whole = request("/embed", b'{"texts":["half"]}')
    before = target.memory_bytes()
    for cut in range(1, len(whole)):
        _, writer = await asyncio.open_connection(LOOPBACK, target.port)
        writer.write(whole[:cut])
        writer.close()
    assert await asyncio.to_thread(target.answers)
    assert target.memory_bytes() - before < 8 << 20


@pytest.mark.parametrize(
    "body",
    [
        b'{"texts":[' + b"1," * 900_000 + b"1]}",
        b'{"texts":["a"],"x":[' + b"[]," * 600_000 + b"[]]}",
        b'{"inputs":["a"],"x":[' + b"{}," * 600_000 + b"{}]}",
        b'{"texts":' + b"[" * 900_000 + b"]" * 900_000 + b"}",
        b'{"texts":["' + b"[{" * 900_000 + b'\\"',
    ],
    ids=["wrong items", "lists", "objects", "depth", "an open string"],
)
async def test_a_body_made_to_be_dear_is_refused_cheaply(target: Target, body: bytes) -> None:
    before = target.memory_bytes()
    began = time.monotonic()
    [status] = statuses(await target.send(request("/embed", body)))
    assert status in {400, 413, 422}
    assert time.monotonic() - began < 1
    assert target.memory_bytes() - before < 64 << 20
