"""Limits of one connection, over a real socket; time is told by the test."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tests.support.raw_connection import EARLY, HEAD, Server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with Server() as server:
        yield server
        assert not server.failures


async def test_a_head_that_does_not_come_to_an_end_is_given_up_with_408(server: Server) -> None:
    caller = await server.connect(HEAD[:20])
    await server.sweep(0, 9)
    await caller.send(HEAD[20:22])
    await server.sweep(10)
    assert await caller.is_open()
    await server.sweep(10.5)
    assert (await caller.reply())[0] == 408


@pytest.mark.parametrize(("sent", "told"), [(b"", 0), (b"\r\n", 408)])
async def test_a_connection_that_sends_no_request_is_closed(server: Server, sent: bytes, told: int) -> None:
    caller = await server.connect(sent)
    await server.sweep(0, 10.5)
    assert (await caller.reply())[0] == told


async def test_a_body_that_comes_a_byte_at_a_time_is_given_up_with_408_in_json(server: Server) -> None:
    caller = await server.connect(HEAD)
    for second, byte in enumerate(b"abcd"):
        await server.sweep(second * 15)
        await caller.send(bytes([byte]))
    await server.sweep(60.5)
    status, body = await caller.reply()
    assert (status, body["error_type"], body["limit"]) == (408, "Timeout", 60)


async def test_time_that_passes_while_we_compute_is_not_the_callers(server: Server) -> None:
    server.gate.clear()
    caller = await server.connect(HEAD + b'"abc"')
    await server.sweep(0, 1000, 2000)
    server.gate.set()
    await caller.send(b"")
    assert await caller.is_open()


async def test_a_connection_that_is_idle_between_requests_is_left_to_keep_alive(server: Server) -> None:
    caller = await server.connect(HEAD + b'"abc"')
    await server.sweep(0, 11, 22)
    await caller.send(HEAD + b'"abc"')
    assert caller._reader._buffer.count(b"200 OK") == 2  # type: ignore[attr-defined]


async def test_a_connection_whose_request_was_answered_by_its_head_is_left_to_keep_alive_too(server: Server) -> None:
    caller = await server.connect(EARLY)
    for byte in (b"abc", b"de"):
        await caller.send(byte)
        await server.sweep(0, 11, 22)
    await caller.send(HEAD + b'"abc"')
    assert caller._reader._buffer.count(b"200 OK") == 2  # type: ignore[attr-defined]


async def test_the_rest_of_a_request_that_was_answered_by_its_head_has_the_time_of_a_body(server: Server) -> None:
    caller = await server.connect(EARLY)
    await caller.send(b"a")
    await server.sweep(0, 59)
    assert len(server.state.connections) == 1
    await server.sweep(61, 62)
    assert (await caller.raw()).count(b"HTTP/1.1") == 1


async def test_a_caller_that_takes_nothing_of_its_reply_is_cut_off(server: Server) -> None:
    caller = await server.connect(HEAD.replace(b"/", b"/large", 1) + b"12345")
    transport = next(iter(server.state.connections)).transport
    assert transport.get_write_buffer_size() > 0
    caller.writer.transport.pause_reading()
    await asyncio.sleep(0.05)
    await server.sweep(0, 30.5)
    assert not server.state.connections


async def test_a_head_that_comes_whole_and_is_too_long_is_refused_with_431(server: Server) -> None:
    whole = HEAD.replace(b"\r\n", b"\r\na: " + b"b" * 3000 + b"\r\n", 1) + b'"abc"'
    for first, then in ((whole, b""), (whole[:2500], whole[2500:])):
        caller = await server.connect(first)
        await caller.send(then)
        status, body = await caller.reply()
        assert (status, body["error"]) == (431, "headers: at most 2000 bytes, got more")


async def test_a_head_without_end_is_refused_with_431(server: Server) -> None:
    caller = await server.connect(b"GET / HTTP/1.1\r\n")
    for _ in range(3):
        await caller.send(b"a: " + b"b" * 1000 + b"\r\n")
    status, body = await caller.reply()
    assert (status, body["error"]) == (431, "headers: at most 2000 bytes, got more")


async def test_chunk_headers_without_end_are_refused(server: Server) -> None:
    caller = await server.connect(b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
    for _ in range(11):
        await caller.send(b"1;" + b"x" * 10_000 + b"\r\na\r\n")
    assert (await caller.reply())[0] == 413


SEVERAL_READS = b"x" * 100_000


@pytest.mark.parametrize(
    ("head", "told"),
    [
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 110000\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nhost: x\r\nx-large: ", 431),
        (b"no http\r\n\r\n", 400),
    ],
)
async def test_who_is_refused_while_sending_can_send_on_and_then_read_why(
    server: Server, head: bytes, told: int
) -> None:
    caller = await server.connect(head + SEVERAL_READS[:5000])
    for _ in range(3):
        await caller.send(SEVERAL_READS[:20_000])
    assert (await caller.reply())[0] == told


async def test_who_is_refused_and_neither_stops_nor_hangs_up_is_cut_off(server: Server) -> None:
    endless, silent = [await server.connect(b"no http\r\n\r\n") for _ in range(2)]
    await endless.send(SEVERAL_READS)
    assert len(server.state.connections) == 2
    await endless.send(SEVERAL_READS)
    assert len(server.state.connections) == 1
    await server.sweep(0, 31)
    assert (len(server.state.connections), (await silent.reply())[0]) == (0, 400)


async def test_what_is_no_http_is_refused_in_json(server: Server) -> None:
    caller = await server.connect(b"\x16\x03\x01 this is TLS\r\n\r\n")
    status, body = await caller.reply()
    assert (status, body["error_type"]) == (400, "Validation")


async def test_a_server_that_ends_waits_for_no_caller_it_has_refused(server: Server) -> None:
    await server.connect(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 110000\r\n\r\n" + b"x" * 5000)
    (connection,) = server.state.connections
    connection.shutdown()
    await asyncio.sleep(0.02)
    assert not server.state.connections
