"""Limits of one connection, over a real socket; time is told by the test."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import re
import socket
import struct
import weakref
from typing import TYPE_CHECKING, Any, Self

import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from embedding_common.http import edge
from embedding_common.http.protocol import MAX_WAITING, LimitedProtocol, Limits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.types import Receive, Scope, Send

LIMITS = Limits(head_bytes=2000, head_s=10, body_s=60, body_bytes=50_000, unread_s=30)
HEAD = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\n"
EARLY = HEAD.replace(b"/", b"/early", 1)
UPGRADE_ONLY = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nupgrade: h2c\r\n\r\n"


class Server:
    """Echoes bodies, answers `/early` without one, and gives `/large` more than a socket takes.

    Its connections are swept by hand.
    """

    def __init__(self, http: type[HttpToolsProtocol] | None = None) -> None:
        self.state = ServerState()
        self.state.default_headers = [(b"date", b"today")]
        self.stops_after_reply = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.failures: list[BaseException] = []
        self._callers: list[Caller] = []
        self._edge = edge.Edge(edge.guarded(self.echo), direct={}, observe=lambda *_: None, draining=lambda: False)
        http = http or LimitedProtocol.with_limits(LIMITS)
        config = uvicorn.Config(self.app, http=http, interface="asgi3", proxy_headers=False, log_config=None)
        config.load()
        self._config = config

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._edge(scope, receive, send)
        except BaseException as failure:
            self.failures.append(failure)
            raise

    async def echo(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/early":
            await edge.send_bytes(send, 200, [b"early"])
            return
        body = await edge.read_body(scope, receive, limit_bytes=50_000)
        await self.gate.wait()
        await edge.send_bytes(send, 200, [b"x" * 50_000_000 if scope["path"] == "/large" else body])
        if self.stops_after_reply:
            for connection in list(self.state.connections):
                connection.shutdown()

    async def __aenter__(self) -> Self:
        make: Any = self._config.http_protocol_class
        self._server = await asyncio.get_running_loop().create_server(
            lambda: make(config=self._config, server_state=self.state, app_state={}), "127.0.0.1", 0
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        for caller in self._callers:
            caller.writer.close()
            with contextlib.suppress(OSError):
                await caller.writer.wait_closed()
        for connection in list(self.state.connections):
            connection.transport.abort()
        self._server.close()
        await asyncio.gather(*self.state.tasks, return_exceptions=True)

    async def connect(self, raw: bytes = b"") -> Caller:
        caller = Caller(*await asyncio.open_connection(*self._server.sockets[0].getsockname()))
        self._callers.append(caller)
        await caller.send(raw)
        return caller

    async def sweep(self, *at_s: float) -> None:
        for now in at_s:
            for connection in list(self.state.connections):
                connection.sweep(now)  # type: ignore[union-attr]
            await asyncio.sleep(0.01)


class Caller:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    async def send(self, raw: bytes) -> None:
        self.writer.write(raw)
        await asyncio.sleep(0.02)  # until the server has read it: both ends share this loop

    async def raw(self) -> bytes:
        """What comes before the connection is closed."""
        async with asyncio.timeout(5):
            return await self._reader.read()

    async def reply(self) -> tuple[int, Any]:
        """Status and body of what comes before the connection is closed."""
        head, _, body = (await self.raw()).partition(b"\r\n\r\n")
        return int(head[9:12] or 0), json.loads(body or b"null")

    async def is_open(self) -> bool:
        with contextlib.suppress(TimeoutError):
            return bool(await asyncio.wait_for(self._reader.read(1), 0.05))
        return True


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


async def test_a_server_that_ends_waits_for_nobody_it_has_refused(server: Server) -> None:
    await server.connect(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 110000\r\n\r\n" + b"x" * 5000)
    (connection,) = server.state.connections
    connection.shutdown()
    await asyncio.sleep(0.02)
    assert not server.state.connections


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
