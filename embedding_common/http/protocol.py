"""One HTTP connection on top of uvicorn: reading, requests in a row, upgrades, and the fast whole reply.

This is what every request passes. The limits of a connection stand in `limits`, whose class `LimitedProtocol` is what a
server uses; a request that arrives in one piece of ordinary size runs no code there.

Private names of uvicorn are used here and in `limits` and `server`. tests/unit/embedding_common/http/
test_uvicorn_internals.py names each of them, and pyproject.toml pins the minor release that they were tested with.
"""

from __future__ import annotations

import abc
import logging
import sys
import weakref
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence, Sized
    from typing import TypeAlias

    from uvicorn._types import ASGI3Application, ASGISendEvent

    WriteWhole: TypeAlias = Callable[[bytes, Sequence[bytes]], bool]
    """See `Connection._write_whole`."""

log = logging.getLogger(__name__)

LATE = "body_late"
"""Key in a scope's state: the body has not arrived in time, and its reader should give up. The value is the limit in
seconds."""

WHOLE = "embedding.whole_reply"
"""Key in a scope's extensions; its `write` is a `WriteWhole`."""

MAX_WAITING = 1000
"""The most requests of one caller that may wait behind the one in hand. One read from the network may bring fourteen
thousand small ones, which take 31 MB."""

TOGETHER_BYTES = 16 << 10
"""The largest reply that is written together with those of other connections. A larger one is written at once: by the
time the others have been made too, it would be out of the processor's caches."""


class _Outlet:
    """The transport as a request sees it. Only how it is closed differs."""

    __slots__ = ("_connection", "_transport", "write")

    def __init__(self, connection: Connection, transport: asyncio.Transport) -> None:
        self._connection: Connection | None = connection
        self._transport = transport
        self.write = transport.write

    def is_closing(self) -> bool:
        return self._connection is None or self._connection.is_ending()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.end()

    def forget(self) -> None:
        """Drops the connection, which refers to its requests as they to it: a reference cycle, once it is lost."""
        self._connection = None


class _OneByOne(FlowControl):
    """Reads nothing while requests wait behind the one in hand.

    uvicorn reads on with every reply, and keeps what it parses: 8 MB of requests in a row, sent by one caller, take
    0.8 GB before the first hundred are answered.
    """

    def __init__(self, transport: asyncio.Transport, waiting: Sized) -> None:
        super().__init__(transport)
        self._waiting = waiting

    def resume_reading(self) -> None:
        if not self._waiting:
            super().resume_reading()


async def _send_expected(cycle: RequestResponseCycle, message: ASGISendEvent) -> None:
    """Closes the connection behind a reply that goes out before the body was asked for.

    Some callers send the body after all. Others go on with their next request, which would be taken for the body; Go's
    client did so until 1.22.4, and that request fails.
    """
    if cycle.waiting_for_100_continue:
        cycle.keep_alive = False
    await RequestResponseCycle.send(cycle, message)


class Connection(HttpToolsProtocol, abc.ABC):
    """One connection. A subclass keeps its limits: it accounts for what arrives slowly or in excess, and refuses."""

    ordinary_bytes: ClassVar[int]
    """A request that arrives whole within this many bytes needs no account."""
    cycle: RequestResponseCycle | None  # type: ignore[assignment]  # uvicorn says it never is None; it is at first
    _wire_bytes = 0  # bytes of a request that has not arrived whole; `_wire_scope` is its scope
    _wire_scope: object = None
    _running: RequestResponseCycle | None = None
    _ready: ClassVar[list[tuple[asyncio.Transport, bytes]]] = []  # replies of all connections of a server
    _refused = False  # True: what still arrives is not looked at
    _body_at: int | None = None  # offset, in the bytes of the last read, of the body of a request that asks to upgrade

    @abc.abstractmethod
    def account(self, read_bytes: int) -> None:
        """Accounts for bytes that were read and do not make up one ordinary request. May refuse the request."""

    @abc.abstractmethod
    def discard(self, read_bytes: int) -> None:
        """Accounts for bytes that a caller sends after it has been refused."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn types it
        super().connection_made(transport)
        self.flow = _OneByOne(transport, self.pipeline)
        self._outlet = _Outlet(self, transport)

    # --- reading ---

    def data_received(self, data: bytes) -> None:
        if self._refused:
            self.discard(len(data))
            return
        read = data
        super().data_received(read)
        while self._body_at is not None and not self.is_ending():
            read, self._body_at = read[self._body_at :], None
            self._unset_keepalive_if_required()
            super().data_received(self._head_without_upgrade())
            super().data_received(read)
        cycle = self.cycle
        is_whole = cycle is not None and cycle.scope is self.scope and not cycle.more_body
        if is_whole and self._wire_bytes + len(data) <= self.ordinary_bytes:
            self._wire_bytes = 0
        else:
            self.account(len(data))

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= MAX_WAITING:
            raise ValueError("too many requests in a row")  # the parser gives up, and the caller is told 400
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        cycle = self.cycle
        if cycle is not None and cycle.response_complete:  # refused by its head: only now may the next one come
            cycle.more_body = False
            self._unset_keepalive_if_required()  # the head of an upgrade ends a message too, before it is fed again
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    # --- requests for another protocol ---

    def _should_upgrade(self) -> bool:
        return any(name == b"upgrade" for name, _ in self.headers)

    def handle_websocket_upgrade(self) -> None:
        """Handles an upgrade to any protocol. Only HTTP/1.1 is spoken here, so it is answered in that (RFC 9110, 7.8).

        The parser takes what follows the head for the other protocol, and would lose the body. Java's own client asks
        for HTTP/2 with every request, as does `curl --http2`.
        """
        parsed = sys.exc_info()[1]
        assert isinstance(parsed, httptools.HttpParserUpgrade)  # noqa: S101 - uvicorn calls this where it catches it
        self._body_at = parsed.args[0]

    def _head_without_upgrade(self) -> bytes:
        scope = self.scope
        line = f"{scope['method']} {self.url.decode('latin-1')} HTTP/{scope['http_version']}\r\n".encode("latin-1")
        kept = [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        return b"".join((line, *kept, b"\r\n"))

    # --- replying ---

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._unset_keepalive_if_required()
        self._running = cycle
        cycle.transport = self._outlet  # type: ignore[assignment]  # all of a transport that uvicorn uses
        cycle.scope["extensions"] = {WHOLE: {"write": partial(self._write_whole, cycle)}}
        if cycle.waiting_for_100_continue:  # the proxy keeps this from being a reference cycle
            cycle.send = partial(_send_expected, weakref.proxy(cycle))  # type: ignore[method-assign]
        super()._start_asgi_task(cycle, app)

    def _write_whole(self, cycle: RequestResponseCycle, head: bytes, parts: Sequence[bytes]) -> bool:
        """Writes a reply of status 200: the header lines `head`, which the caller vouches for, and the body `parts`.

        Returns False if nothing has been written: the reply then has to go message by message, which knows how to
        wait.
        """
        if cycle.disconnected or self.is_ending():
            cycle.disconnected = True  # as the connection will say in a moment; uvicorn would miss a reply
            return True
        if cycle.response_started or cycle.more_body or self.flow.write_paused:
            return False
        cycle.response_started = cycle.response_complete = True
        cycle.waiting_for_100_continue = False
        first = [STATUS_LINE[200]]
        for name, value in cycle.default_headers:
            first += (name, b": ", value, b"\r\n")
        last = b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n"
        reply = b"".join((*first, head, last, *parts))
        cycle.message_event.set()
        if cycle.keep_alive and len(reply) <= TOGETHER_BYTES:
            self._write_soon(reply)
        else:
            self.transport.write(reply)
        if not cycle.keep_alive:
            self.transport.close()
        cycle.on_response()
        return True

    def _write_soon(self, reply: bytes) -> None:
        """Writes the reply together with the others of this round of the event loop, once all have been made.

        The kernel's code and ours then do not push each other out of the processor's caches with every reply, and a
        host that reads several of them is woken once (77 instead of 98 microseconds for a cached text). Nothing else
        is written to the connection before: all other writers run later, or first see to it that this has been done.
        """
        if not self._ready:
            self.loop.call_soon(self._write_ready)
        self._ready.append((self.transport, reply))

    @classmethod
    def _write_ready(cls) -> None:
        ready = cls._ready[:]
        cls._ready.clear()
        for transport, reply in ready:
            if transport.is_closing():
                continue  # its caller has gone; uvloop would raise
            try:
                transport.write(reply)
            except Exception:  # no failure of one reply may take the others along
                log.exception("a reply cannot be written")
                transport.abort()

    # --- ending ---

    def is_ending(self) -> bool:
        """Whether nothing more can be written."""
        return self._refused or self.transport.is_closing()

    def end(self) -> None:
        """Closes the connection behind a reply, but reads on while its caller has not sent everything (RFC 9112, 9.6).

        What comes to a closed connection is answered with a reset, and many callers never read a reply that came
        before it: to them the connection broke, and they send all of it again.
        """
        if self._running is not None and self._running.more_body:
            self._half_close()
        else:
            self.transport.close()

    def _half_close(self) -> None:
        if not self.is_ending():
            self._refused, self._wire_bytes = True, 0
            self.pipeline.clear()
            if self.cycle is not None:
                self.cycle.body.clear()
            self.transport.write_eof()
            self.flow.resume_reading()

    def shutdown(self) -> None:
        self._write_ready()  # before the connection is closed as an idle one
        if self._refused:
            self.transport.close()
        super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn leaves the timer, and with it the connection, after a reset
        self._outlet.forget()
        self._end_running()

    def _end_running(self) -> None:
        """Tells the request in hand that its caller is gone.

        uvicorn tells only the one that came last; one before it would go on to write where nothing can be written.
        """
        running = self._running
        if running is not None and not running.response_complete:
            running.disconnected = True
            running.message_event.set()
