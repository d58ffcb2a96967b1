"""The limits of a connection, which uvicorn leaves to a proxy in front of it, and what happens to callers beyond them.

They bound a request's head, the time that a request may take to arrive, and how long a caller may leave its reply
unread. Bytes are counted as they are read, only for requests that do not arrive whole and small. Times are kept by
`sweep`, once a second for each connection, so that no request pays for a timer.
"""

from __future__ import annotations

import enum
import logging
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from embedding_common import refusals
from embedding_common.http.protocol import LATE, Connection

if TYPE_CHECKING:
    from typing import Self

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one connection, in bytes and seconds."""

    head_bytes: int = 64 << 10
    """The largest request line with headers: eight times what common servers allow, for clients with large cookies or
    tokens. One read from the network (256 kB) may bring more before it is noticed."""
    head_s: float = 10.0
    """The longest time for a head to arrive: HAProxy's own limit (`timeout http-request`). It also holds for a
    connection that sends nothing."""
    body_s: float = 60.0
    """The longest time for a body to arrive: the largest (32 MiB) takes this long at 4.5 Mbit/s."""
    body_bytes: int = 32 << 20
    """The largest body that the routes accept. Twice as much may come over the wire: that leaves room for the headers
    of chunks, but not for endless ones."""
    rest_s: float = 30.0
    """The longest time for a caller that has been refused to end what it sends, and to read why."""
    unread_s: float = 30.0
    """The longest time for a caller that has stopped reading its reply, which is held in memory meanwhile."""

    @property
    def request_bytes(self) -> int:
        """The most bytes of one request on the wire."""
        return self.head_bytes + 2 * self.body_bytes


class _Waits(enum.Enum):
    """What a connection waits for while it is its caller's turn."""

    HEAD = enum.auto()
    BODY = enum.auto()
    READER = enum.auto()
    REST = enum.auto()


class LimitedProtocol(Connection):
    """One connection with limits. Use `with_limits`; the server must call `sweep` about once a second."""

    limits: ClassVar[Limits] = Limits()
    ordinary_bytes: ClassVar[int] = limits.head_bytes
    _stalled: tuple[object, ...] | None = None  # what the last sweep found the connection to wait for, and since when
    _stalled_at = 0.0

    @classmethod
    def with_limits(cls, limits: Limits) -> type[Self]:
        """Returns the class for the connections of one server."""
        return type(cls.__name__, (cls,), {"limits": limits, "ordinary_bytes": limits.head_bytes, "_ready": []})

    # --- bytes ---

    def account(self, read_bytes: int) -> None:
        cycle = self.cycle
        in_head = cycle is None or cycle.scope is not self.scope
        earlier_bytes = self._wire_bytes if self._wire_scope is self.scope else 0
        if earlier_bytes + read_bytes > self.limits.head_bytes and not in_head and self._head_is_too_long():
            self._refuse_head()  # one read may be larger than a head, and bring it whole
            return
        if cycle is not None and not in_head and not cycle.more_body:
            self._wire_bytes = 0
            return
        if self._wire_scope is self.scope:
            self._wire_bytes += read_bytes
        else:  # part of what was read may belong to the request before it
            self._wire_scope, self._wire_bytes = self.scope, min(read_bytes, self.limits.head_bytes)
        if in_head and self._wire_bytes > self.limits.head_bytes:
            self._refuse_head()
        elif self._wire_bytes > self.limits.request_bytes:
            self._refuse(413, f"request: at most {self.limits.request_bytes} bytes, got more", "Validation")

    def discard(self, read_bytes: int) -> None:
        self._wire_bytes += read_bytes
        if self._wire_bytes > self.limits.request_bytes:
            self.transport.close()

    def _head_is_too_long(self) -> bool:
        scope = self.scope
        fields_bytes = sum(len(name) + len(value) for name, value in scope["headers"])
        return len(scope["raw_path"]) + len(scope["query_string"]) + fields_bytes > self.limits.head_bytes

    # --- times ---

    def sweep(self, now: float) -> None:
        """Ends what its caller has left hanging. `now` is in seconds of the monotonic clock."""
        waits = self._waits()
        if waits != self._stalled:
            self._stalled, self._stalled_at = waits, now
        elif waits is not None:
            self._check(waits[0], now - self._stalled_at)

    def _waits(self) -> tuple[object, ...] | None:
        """What the connection waits for, and for which one: two requests in a row are told apart. None: our turn."""
        unread_bytes = self.transport.get_write_buffer_size()
        if unread_bytes:
            return _Waits.READER, unread_bytes
        if self._refused:
            return (_Waits.REST,)
        cycle = self.cycle
        arriving = cycle is not None and cycle.scope is self.scope and cycle.more_body
        if cycle is not None and not cycle.response_complete:  # at work, perhaps on one of several requests
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
            if LATE in cycle.scope["state"]:  # set by an earlier sweep, and no reader has given up
                self.transport.close()
            cycle.scope["state"][LATE] = limits.body_s
            cycle.message_event.set()  # wakes the reader that awaits the next part

    # --- refusing ---

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's, which logs the message itself
        self._refuse(400, "request: not HTTP that can be understood here", "Validation")

    def _refuse_head(self) -> None:
        self._refuse(431, f"headers: at most {self.limits.head_bytes} bytes, got more", "Validation")

    def _refuse(self, status: int, error: str, error_type: str) -> None:
        """Answers what never became a request, and closes. Nothing is written into a reply that has begun."""
        self._write_ready()
        if self.is_ending():
            return
        request_id = secrets.token_hex(8)
        log.info("request_id=%s refused with %d: %s", request_id, status, error)
        if self._may_answer():
            reply = refusals.ErrorReply(error=error, error_type=error_type, request_id=request_id)
            body = reply.model_dump_json(exclude_none=True).encode()
            headers = f"connection: close\r\nx-request-id: {request_id}\r\ncontent-length: {len(body)}\r\n\r\n"
            kind = b"content-type: application/json\r\n"
            self.transport.write(STATUS_LINE[status] + kind + headers.encode() + body)
            self._half_close()
        else:
            self.end()
        self._end_running()

    def _may_answer(self) -> bool:
        """Whether a refusal would be the first reply to the request, and would break into no other reply."""
        running = self._running
        if running is None or not running.response_started:
            return True
        return running.response_complete and running.scope is not self.scope
