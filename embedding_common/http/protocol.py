"""What uvicorn leaves to a proxy in front: limits on a request's head, on the time a request may take to arrive, and on
callers that do not take their reply. And a short cut: an app may write a whole reply in one go (`WHOLE`).

All limits but a comparison for each read from the network are kept by `sweep`, once a second and connection: a request
that arrives in one piece pays nothing for timers.
"""

from __future__ import annotations

import enum
import logging
import secrets
import sys
import weakref
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from embedding_common import native

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Sequence, Sized
    from typing import Self, TypeAlias

    from uvicorn._types import ASGI3Application, ASGISendEvent

    WriteWhole: TypeAlias = Callable[[bytes, Sequence[bytes]], bool]
    """See `LimitedProtocol._write_whole`."""

log = logging.getLogger(__name__)

LATE = "body_late"
"""In a scope's state: the body has not arrived in time, and whoever reads it should give up."""

WHOLE = "embedding.whole_reply"
"""In a scope's extensions; its `write` is a `WriteWhole`."""


MAX_WAITING = 1000
"""Requests of one caller behind the one in hand. One read may bring fourteen thousand small ones, 31 MB of them."""
TOGETHER_BYTES = 16 << 10
"""A larger reply is written at once: once others have been made too, it is out of the processor's caches."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one connection."""

    head_bytes: int = 64 << 10
    """Request line and headers: eight times what common servers allow, for clients with large cookies or tokens. One
    read from the network (256 kB) may pass it."""
    head_s: float = 10.0
    """For a head to arrive: HAProxy's own limit (`timeout http-request`), also for a connection that sends nothing."""
    body_s: float = 60.0
    """For a body to arrive: the largest (32 MiB) takes this long at 4.5 Mbit/s."""
    body_bytes: int = 32 << 20
    """Of what the routes accept. Twice that may come over the wire: room for chunk headers, not for endless ones."""
    rest_s: float = 30.0
    """For a caller that has been refused to end what it sends, and to read why."""
    unread_s: float = 30.0
    """For a caller that has stopped taking its reply, which is held in memory meanwhile."""

    @property
    def request_bytes(self) -> int:
        return self.head_bytes + 2 * self.body_bytes


class _Waits(enum.Enum):
    """What a connection waits for, if that is its caller's turn."""

    HEAD = enum.auto()
    BODY = enum.auto()
    READER = enum.auto()
    REST = enum.auto()


class _Outlet:
    """What a request writes its reply to: the transport, but for how it is closed."""

    __slots__ = ("_protocol", "_transport", "write")

    def __init__(self, protocol: LimitedProtocol, transport: asyncio.Transport) -> None:
        self._protocol: LimitedProtocol | None = protocol
        self._transport = transport
        self.write = transport.write

    def is_closing(self) -> bool:
        return self._protocol is None or self._protocol.is_ending()

    def close(self) -> None:
        if self._protocol is not None:
            self._protocol.end()

    def forget(self) -> None:
        """A request leads here and a connection to its requests: a ring, once the connection is lost."""
        self._protocol = None


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

    Some callers send the body after all, others go on with their next request, which would be taken for the body: to
    Go's client until 1.22.4 that request fails.
    """
    if cycle.waiting_for_100_continue:
        cycle.keep_alive = False
    await RequestResponseCycle.send(cycle, message)


class LimitedProtocol(HttpToolsProtocol):
    """One connection. Use `with_limits`; the server must call `sweep` about once a second."""

    limits: ClassVar[Limits] = Limits()
    cycle: RequestResponseCycle | None  # type: ignore[assignment]  # uvicorn says it never is None; it is at first
    _wire_bytes = 0  # of a request that has not arrived whole, and which one that is
    _wire_scope: object = None
    _running: RequestResponseCycle | None = None
    _ready: ClassVar[list[tuple[asyncio.Transport, bytes]]] = []  # of all connections of a server
    _stalled: tuple[object, ...] | None = None
    _stalled_at = 0.0
    _refused = False  # what still arrives is not looked at
    _body_at: int | None = None  # within what was read, of a request that asks to go on in another protocol

    @classmethod
    def with_limits(cls, limits: Limits) -> type[Self]:
        return type(cls.__name__, (cls,), {"limits": limits, "_ready": []})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn types it
        super().connection_made(transport)
        self.flow = _OneByOne(transport, self.pipeline)
        self._outlet = _Outlet(self, transport)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            self._wire_bytes += len(data)
            if self._wire_bytes > self.limits.request_bytes:
                self.transport.close()
            return
        read = data
        super().data_received(read)
        while self._body_at is not None and not self.is_ending():
            read, self._body_at = read[self._body_at :], None
            self._unset_keepalive_if_required()
            super().data_received(self._head_without_upgrade())
            super().data_received(read)
        cycle = self.cycle
        in_head = cycle is None or cycle.scope is not self.scope
        earlier_bytes = self._wire_bytes if self._wire_scope is self.scope else 0
        if earlier_bytes + len(data) > self.limits.head_bytes and not in_head and self._head_is_too_long():
            self._refuse_head()  # one read may be larger than a head, and bring it whole
            return
        if cycle is not None and not in_head and not cycle.more_body:
            self._wire_bytes = 0
            return
        if self._wire_scope is self.scope:
            self._wire_bytes += len(data)
        else:  # what was read along may belong to the request before it
            self._wire_scope, self._wire_bytes = self.scope, min(len(data), self.limits.head_bytes)
        if in_head and self._wire_bytes > self.limits.head_bytes:
            self._refuse_head()
        elif self._wire_bytes > self.limits.request_bytes:
            self._refuse(413, f"request: at most {self.limits.request_bytes} bytes, got more", "Validation")

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= MAX_WAITING:
            raise ValueError("too many requests in a row")  # the parser gives up, and the caller is told 400
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        cycle = self.cycle
        if cycle is not None and cycle.response_complete:  # refused by its head: only now may the next one come
            cycle.more_body = False
            self._unset_keepalive_if_required()  # an upgrade's head ends a message too, before it is fed again
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _should_upgrade(self) -> bool:
        return any(name == b"upgrade" for name, _ in self.headers)

    def handle_websocket_upgrade(self) -> None:
        """Of any protocol. None is spoken here but HTTP/1.1, in which such a request is then answered (RFC 9110, 7.8).

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

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._unset_keepalive_if_required()
        self._running = cycle
        cycle.transport = self._outlet  # type: ignore[assignment]  # all of a transport that uvicorn uses
        cycle.scope["extensions"] = {WHOLE: {"write": partial(self._write_whole, cycle)}}
        if cycle.waiting_for_100_continue:
            cycle.send = partial(_send_expected, weakref.proxy(cycle))  # type: ignore[method-assign]  # no ring
        super()._start_asgi_task(cycle, app)

    def _write_whole(self, cycle: RequestResponseCycle, head: bytes, parts: Sequence[bytes]) -> bool:
        """A reply of status 200 with the lines of `head`, which the caller vouches for, and its body.

        False: nothing has been written, and the reply has to go message by message, which knows how to wait.
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
        """With the other replies of this round of the loop, once all have been made.

        The kernel's code and ours then do not push each other out of the processor's caches with every reply, and a
        host that reads several of them is woken once (77 instead of 98 microseconds for a cached text). Nothing else
        is written to the connection before: whatever would, runs later, or sees to it that this has been done.
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
            except Exception:  # whatever it is, it must not take the others' replies along
                log.exception("a reply cannot be written")
                transport.abort()

    def shutdown(self) -> None:
        self._write_ready()  # before the connection is closed as an idle one
        if self._refused:
            self.transport.close()
        super().shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn leaves it, and with it the connection, if it was reset
        self._outlet.forget()
        self._end_running()

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

    def _end_running(self) -> None:
        """Tells the request in hand that its caller is gone.

        uvicorn tells only the one that came last; one before it would go on to write where nothing can be written.
        """
        running = self._running
        if running is not None and not running.response_complete:
            running.disconnected = True
            running.message_event.set()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's, which logs the message itself
        self._refuse(400, "request: not HTTP that can be understood here", "Validation")

    def sweep(self, now: float) -> None:
        """Ends what its caller has left hanging. `now` is in seconds of the monotonic clock."""
        waits = self._waits()
        if waits != self._stalled:
            self._stalled, self._stalled_at = waits, now
        elif waits is not None:
            self._check(waits[0], now - self._stalled_at)

    def _waits(self) -> tuple[object, ...] | None:
        """What for, and for which one: two of the same in a row are told apart."""
        unread_bytes = self.transport.get_write_buffer_size()
        if unread_bytes:
            return _Waits.READER, unread_bytes
        if self._refused:
            return (_Waits.REST,)
        cycle = self.cycle
        arriving = cycle is not None and cycle.scope is self.scope and cycle.more_body
        if cycle is not None and not cycle.response_complete:  # at work; on one of several requests, maybe
            return (_Waits.BODY, id(cycle)) if arriving and not self.pipeline else None
        if self.timeout_keep_alive_task is not None:
            return None
        return (_Waits.BODY, id(cycle)) if arriving else (_Waits.HEAD, id(self.scope))

    def _check(self, waits: object, waited_s: float) -> None:
        limits = self.limits
        if waits is _Waits.READER and waited_s > limits.unread_s:
            log.info("a caller took nothing of its reply for %.0f s", waited_s)
            self.transport.abort()
        elif waits is _Waits.REST and waited_s > limits.rest_s:
            self.transport.close()
        elif waits is _Waits.HEAD and waited_s > limits.head_s:
            if self._wire_bytes:
                self._refuse(408, f"headers: not complete after {limits.head_s:g} s", "Timeout")
            self.transport.close()
        elif waits is _Waits.BODY and waited_s > limits.body_s and (cycle := self.cycle) is not None:
            if LATE in cycle.scope["state"]:  # told a sweep ago, and nobody listens
                self.transport.close()
            cycle.scope["state"][LATE] = limits.body_s
            cycle.message_event.set()  # wakes whoever awaits the next part

    def _head_is_too_long(self) -> bool:
        scope = self.scope
        fields_bytes = sum(len(name) + len(value) for name, value in scope["headers"])
        return len(scope["raw_path"]) + len(scope["query_string"]) + fields_bytes > self.limits.head_bytes

    def _refuse_head(self) -> None:
        self._refuse(431, f"headers: at most {self.limits.head_bytes} bytes, got more", "Validation")

    def _refuse(self, status: int, error: str, error_type: str) -> None:
        """Answers what never became a request, and hangs up. Nothing is written into a reply that has begun."""
        self._write_ready()
        if self.is_ending():
            return
        request_id = secrets.token_hex(8)
        log.info("request_id=%s refused with %d: %s", request_id, status, error)
        running = self._running
        answered = running is not None and running.response_complete and running.scope is self.scope
        if running is None or (running.response_complete and not answered) or not running.response_started:
            reply = native.ErrorReply(error=error, error_type=error_type, request_id=request_id)
            body = reply.model_dump_json(exclude_none=True).encode()
            headers = f"connection: close\r\nx-request-id: {request_id}\r\ncontent-length: {len(body)}\r\n\r\n"
            kind = b"content-type: application/json\r\n"
            self.transport.write(STATUS_LINE[status] + kind + headers.encode() + body)
            self._half_close()
        else:
            self.end()
        self._end_running()
