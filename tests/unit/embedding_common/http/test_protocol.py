"""One connection over a real socket: requests in a row, upgrades, whole replies."""

from __future__ import annotations

import asyncio
import gc
import re
import socket
import struct
import weakref
from typing import TYPE_CHECKING, Any

import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from embedding_common.http.limits import LimitedProtocol
from embedding_common.http.protocol import MAX_WAITING
from tests.support.raw_connection import EARLY, HEAD, LIMITS, UPGRADE_ONLY, Server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with Server() as server:
        yield server
        assert not server.failures


@pytest.mark.parametrize(("path", "closes"), [(b"/early", True), (b"/", False)])
async def test_who_asks_before_sending_a_body_and_is_answered_is_not_taken_for_still_sending_it(
    server: Server, path: bytes, closes: bool
) -> None:
    caller = await server.connect(HEAD.replace(b"/", path, 1).replace(b"host: x", b"host: x\r\nexpect: 100-continue"))
    await caller.send(b"" if closes else b'"abc"')
    assert (b"connection: close" in caller._reader._buffer) is closes  # type: ignore[attr-defined]


async def test_requests_sent_in_a_row_are_each_answered(server: Server) -> None:
    caller = await server.connect((HEAD + b'"abc"') * 20 + HEAD)
    await caller.send(b'"abc"')
    assert caller._reader._buffer.count(b"200 OK") == 21  # type: ignore[attr-defined]


async def test_more_requests_in_a_row_than_anybody_sends_are_refused(server: Server) -> None:
    server.gate.clear()
    caller = await server.connect(HEAD + b'"abc"' + b"GET / HTTP/1.1\r\nhost: x\r\n\r\n" * (MAX_WAITING + 1))
    assert (await caller.reply())[0] == 400


@pytest.mark.parametrize("after", [b"", UPGRADE_ONLY])
async def test_no_timer_outlives_its_connection(server: Server, after: bytes) -> None:
    caller = await server.connect(EARLY)
    await caller.send(b"hello" + after)
    (connection,) = server.state.connections
    linger = struct.pack("ii", 1, 0)  # a reset, as of a caller that is killed
    caller.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    caller.writer.transport.abort()
    await asyncio.sleep(0.02)
    here = weakref.ref(connection)
    del connection
    gc.collect()
    assert (len(server.state.connections), here()) == (0, None)


async def test_the_rest_of_a_request_that_was_answered_gets_no_second_answer(server: Server) -> None:
    caller = await server.connect(EARLY.replace(b"content-length: 5", b"transfer-encoding: chunked"))
    await caller.send(b"no chunk\r\n")
    assert (await caller.raw()).count(b"HTTP/1.1 ") == 1


UPGRADE = HEAD.replace(b"host: x", b"host: x\r\nconnection: Upgrade, HTTP2-Settings\r\nupgrade: h2c")
CHUNKED = UPGRADE.replace(b"content-length: 5", b"transfer-encoding: chunked")


@pytest.mark.parametrize(
    "parts",
    [
        [UPGRADE + b"hello"],
        [UPGRADE[:70], UPGRADE[70:] + b"he", b"llo"],
        [UPGRADE, b"hello"],
        [CHUNKED + b"2\r\nhe\r\n", b"3\r\nllo\r\n0\r\n\r\n"],
    ],
)
async def test_a_request_that_asks_for_http_2_is_answered_in_http_1(server: Server, parts: list[bytes]) -> None:
    caller = await server.connect()
    for part in [*parts, *parts, UPGRADE + b"again" + UPGRADE + b"third"]:
        await caller.send(part)
    replies = bytes(caller._reader._buffer)  # type: ignore[attr-defined]
    assert (replies.count(b"200 OK"), replies.count(b"hello"), replies.count(b"again")) == (4, 2, 1)


async def test_nothing_is_read_while_requests_wait_behind_the_one_in_hand(server: Server) -> None:
    server.gate.clear()
    caller = await server.connect((HEAD + b"hello") * 2)
    await caller.send((HEAD + b"hello") * 10)
    (connection,) = server.state.connections
    waiting = len(connection.pipeline)  # type: ignore[union-attr]
    server.gate.set()
    await caller.send(b"")
    assert (waiting, caller._reader._buffer.count(b"200 OK")) == (1, 12)  # type: ignore[attr-defined]


async def test_a_caller_that_leaves_with_a_request_in_hand_and_one_behind_it_breaks_nothing(server: Server) -> None:
    server.gate.clear()
    caller = await server.connect((HEAD + b'"abc"') * 2)
    caller.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    caller.writer.close()
    await asyncio.sleep(0.05)
    server.gate.set()
    await asyncio.sleep(0.05)
    assert not server.state.tasks


CLOSING = b"POST / HTTP/1.1\r\nhost: x\r\nx-request-id: r\r\nconnection: close\r\ncontent-length: 5\r\n\r\nhello"
OLD = b"POST / HTTP/1.0\r\nx-request-id: r\r\ncontent-length: 5\r\n\r\nhello"


@pytest.mark.parametrize("request_", [CLOSING, OLD, HEAD + b"first" + CLOSING.replace(b"hello", b"again")])
async def test_a_reply_written_in_one_go_is_the_one_that_uvicorn_would_write(request_: bytes) -> None:
    replies = []
    for http in (None, HttpToolsProtocol):
        async with Server(http) as server:
            raw = await (await server.connect(request_)).raw()
            replies.append(sorted(_without_own_ids(raw).split(b"\r\n")))
    assert replies[0] == replies[1]


def _without_own_ids(raw: bytes) -> bytes:
    return re.sub(rb"x-request-id: [0-9a-f]{16}", b"x-request-id: made", raw)


async def test_a_reply_that_is_about_to_be_written_goes_out_before_the_server_stops(server: Server) -> None:
    server.stops_after_reply = True
    raw = await (await server.connect(HEAD + b"hello")).raw()
    assert raw.endswith(b"hello")


async def test_what_follows_a_request_and_is_no_http_does_not_overtake_its_reply(server: Server) -> None:
    caller = await server.connect(HEAD + b"hello")
    caller.writer.write(HEAD + b"again" + b"\0\0 no http\r\n\r\n")
    raw = await caller.raw()
    assert raw.startswith(b"HTTP/1.1 200"), raw
    assert raw.index(b"hello") < raw.index(b"HTTP/1.1 400")


class Transport:
    def __init__(self, *, closing: bool = False) -> None:
        self.closing = closing
        self.written = b""
        self.aborted = False

    def is_closing(self) -> bool:
        return self.closing

    def write(self, reply: bytes) -> None:
        if self.closing or reply == b"poison":
            raise RuntimeError("unable to perform operation; the handler is closed")  # as uvloop's does
        self.written += reply

    def abort(self) -> None:
        self.aborted = True


def test_a_caller_that_has_gone_takes_no_others_reply_along() -> None:
    http = LimitedProtocol.with_limits(LIMITS)
    gone, broken, waiting = Transport(closing=True), Transport(), Transport()
    replies: list[tuple[Any, bytes]] = [(gone, b"one"), (broken, b"poison"), (waiting, b"three")]
    http._ready.extend(replies)
    http._write_ready()
    assert (waiting.written, broken.aborted, http._ready) == (b"three", True, [])


async def test_a_request_that_is_over_leaves_nothing_to_the_collector(server: Server) -> None:
    caller = await server.connect(HEAD + b"hello")
    (connection,) = server.state.connections
    over = weakref.ref(connection.cycle)  # type: ignore[union-attr, arg-type]
    gc.disable()
    try:
        await caller.send(HEAD + b"again")
        assert over() is None
    finally:
        gc.enable()
