"""The edge of both servers, around their apps: request ids, bodies with a limit, whole replies, JSON refusals."""

from __future__ import annotations

import itertools
import logging
import re
import secrets
import time
from typing import TYPE_CHECKING, Protocol, TypeAlias

from starlette.exceptions import HTTPException
from starlette.responses import Response

from embedding_common import errors, refusals
from embedding_common.contract import REQUEST_ID_HEADER
from embedding_common.http.protocol import LATE, WHOLE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from embedding_common.http.protocol import WriteWhole

    ErrorBody: TypeAlias = Callable[[errors.Problem, str], tuple[int, bytes]]
    """Status and JSON of a refusal, from the problem and the request's id."""

log = logging.getLogger(__name__)

JOIN_BYTES = 1 << 18
"""The largest reply that is joined into one piece: below it one copy costs less than a system call for each part."""
MAX_REQUEST_ID_CHARS = 128
# A made id has eight random digits of this process and eight that count: unique, without a system call each time.
_ID_PREFIX = secrets.token_hex(4).encode()
_ID_COUNTER = itertools.count(secrets.randbits(32))
_PLAIN_ID = re.compile(rb"[\x21-\x7e]+")  # what may be logged and sent back without escaping
_BODY_UNREAD = (408, 413)  # statuses that leave the rest of a body unread: the connection carries no other request


class Drainable(Protocol):
    """A process that may be told to stop."""

    @property
    def draining(self) -> bool:
        """True once every reply should close its connection, so that a balancer opens the next one elsewhere."""


def header(scope: Scope, name: str) -> str | None:
    """Returns the first value of a header, or None. `name` is in lower case."""
    wanted = name.encode()
    for key, value in scope["headers"]:
        if key == wanted:
            return str(value, "latin-1")
    return None


def _ignore(_: int) -> None:
    """Is what `read_body` reports to where the size of bodies is not counted."""


async def read_body(
    scope: Scope, receive: Receive, *, limit_bytes: int, grown: Callable[[int], None] = _ignore
) -> bytes:
    """Returns the whole body of a request. `grown` is called with its size so far, in bytes, and may refuse more.

    Raises `BodyTooLarge` as soon as that is known, `ClientGone` if the caller hangs up, and `RequestTimeout` when
    `LimitedProtocol` says that it took too long.
    """
    declared = header(scope, "content-length")
    if declared is not None and declared.isdigit() and int(declared) > limit_bytes:
        raise _too_large(int(declared), limit_bytes)
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise errors.ClientGone
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > limit_bytes:
            raise _too_large(size, limit_bytes)
        grown(size)
        if not message.get("more_body", False):
            return part if not parts else b"".join((*parts, part))
        parts.append(part)
        if (limit_s := scope["state"].get(LATE)) is not None:
            raise errors.RequestTimeout(f"body: not complete after {limit_s:g} s", field="body", limit=limit_s)


def _too_large(size: int, limit_bytes: int) -> errors.BodyTooLarge:
    return errors.BodyTooLarge(
        f"body: at most {limit_bytes} bytes, got {size}", field="body", limit=limit_bytes, value=size
    )


async def disconnected(receive: Receive) -> None:
    """Returns when the caller hangs up; only to be awaited once the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_bytes(
    send: Send,
    status: int,
    parts: Sequence[bytes],
    *,
    content_type: str = "application/json",
    headers: Iterable[tuple[bytes, bytes]] = (),
) -> None:
    """Sends a whole reply. A large one goes out part by part, so that it is never copied into one piece."""
    length = sum(map(len, parts))
    start = [(b"content-type", content_type.encode()), (b"content-length", b"%d" % length), *headers]
    if length <= JOIN_BYTES:
        if status == 200 and isinstance(send, _Sender) and send.at_once(start, parts):  # noqa: PLR2004
            return
        parts = [b"".join(parts)]
    await send({"type": "http.response.start", "status": status, "headers": start})
    last = len(parts) - 1
    for index, part in enumerate(parts):
        await send({"type": "http.response.body", "body": part, "more_body": index < last})


async def send_problem(
    send: Send, problem: errors.Problem, request_id: str, *, error_body: ErrorBody = refusals.error_body
) -> None:
    """Sends a refusal; `error_body` writes it in the form of a dialect."""
    status, body = error_body(problem, request_id)
    await send_bytes(send, status, [body], headers=_refusal_headers(problem, status))


def _refusal_headers(problem: errors.Problem, status: int) -> list[tuple[bytes, bytes]]:
    headers = []
    if problem.retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % max(1, round(problem.retry_after_s))))
    if status in _BODY_UNREAD:
        headers.append((b"connection", b"close"))
    if status == 401:  # noqa: PLR2004 - RFC 9110 wants the scheme named
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 500:  # noqa: PLR2004 - without it OpenAI's clients send the request twice more, to fail again
        headers.append((b"x-should-retry", b"false"))
    return headers


def native_refusals(_: Scope) -> ErrorBody:
    """Returns the native form of refusals, for servers that speak no other dialect."""
    return refusals.error_body


def guarded(
    endpoint: Callable[[Scope, Receive, Send], Awaitable[None]],
    *,
    refusals_of: Callable[[Scope], ErrorBody] = native_refusals,
) -> ASGIApp:
    """Returns an ASGI app around `endpoint` that answers every exception: a `Problem` by table, others by a plain 500.

    `refusals_of` returns the form of the dialect that the request speaks; it is called only for a refusal.
    """

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        request_id = scope["state"]["request_id"]
        try:
            await endpoint(scope, receive, send)
        except errors.Problem as problem:
            await send_problem(send, problem, request_id, error_body=refusals_of(scope))
        except errors.ClientGone:
            log.info("request_id=%s the caller hung up", request_id)
        except Exception:
            log.exception("request_id=%s failed", request_id)
            generic = errors.InferenceFailed("internal error; the log has the detail under this request_id")
            await send_problem(send, generic, request_id, error_body=refusals_of(scope))

    return app


def answer_unknown_routes(app: FastAPI, *, refusals_of: Callable[[Scope], ErrorBody] = native_refusals) -> None:
    """Gives refusals by the router itself (404, 405) and problems raised by its routes the form of all others."""

    async def refuse(request: Request, refusal: HTTPException) -> Response:
        allowed = (refusal.headers or {}).get("allow") or (refusal.headers or {}).get("Allow")
        problem = _wrong_method(request, allowed) if allowed is not None else _unknown_path(request.scope)
        status, body = refusals_of(request.scope)(problem, request.scope["state"]["request_id"])
        return Response(body, status, refusal.headers, "application/json")

    async def answer(request: Request, problem: errors.Problem) -> Response:
        status, body = refusals_of(request.scope)(problem, request.scope["state"]["request_id"])
        headers = {name.decode(): value.decode() for name, value in _refusal_headers(problem, status)}
        return Response(body, status, headers, "application/json")

    app.add_exception_handler(HTTPException, refuse)  # type: ignore[arg-type]  # Starlette types handlers by Exception
    app.add_exception_handler(errors.Problem, answer)  # type: ignore[arg-type]  # likewise


def _wrong_method(request: Request, allowed: str) -> errors.WrongMethod:
    # `request.url` would be made from the Host header, and fails if that is wrong
    path = request.scope["path"][:200]
    return errors.WrongMethod(
        f"method: {path} takes {allowed}, got {request.method}",
        field="method",
        limit=allowed,
        value=request.method,
    )


def _unknown_path(scope: Scope) -> errors.UnknownPath:
    path = scope["path"][:200]
    return errors.UnknownPath(f"path: {path} is not served here; see /openapi.json", field="path", value=path)


class Edge:
    """The outermost ASGI layer: gives each request an id, and puts it on the reply.

    `observe(scope, status, seconds)` is called once for each request, when its reply is out or its caller has gone.

    `direct` holds the apps of paths whose cost counts: a POST to exactly such a path goes straight there. The framework
    has the same path for its OpenAPI document and for 405, and answers everything else. A slash at the end of a path
    makes no difference: many clients do not follow redirects.

    `admit(scope)`, if there is one, raises a `Problem` for a request that may go no further; `refusals_of(scope)`
    returns the form in which it is refused.

    While `process.draining` is true every reply closes its connection, so that a balancer opens the next one elsewhere.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        direct: Mapping[str, ASGIApp],
        observe: Callable[[Scope, int, float], None],
        process: Drainable,
        admit: Callable[[Scope], None] | None = None,
        refusals_of: Callable[[Scope], ErrorBody] = native_refusals,
    ) -> None:
        self._app = app
        self._direct = direct
        self._observe = observe
        self._process = process
        self._admit = admit
        self._refusals_of = refusals_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        sender = _Sender(send, scope, _request_id(scope), self._process)
        request_id = sender.request_id.decode()
        scope.setdefault("state", {})["request_id"] = request_id
        path = scope["path"]
        if path[-1:] == "/":
            path = scope["path"] = path.rstrip("/") or "/"
        direct = self._direct.get(path) if scope["method"] == "POST" else None
        try:
            try:
                if self._admit is not None:
                    self._admit(scope)
                if path[-1:] == "\n" and path[:-1] in self._direct:  # the router would take it for the path without
                    raise _unknown_path(scope)
            except errors.Problem as refusal:
                await send_problem(sender, refusal, request_id, error_body=self._refusals_of(scope))
                return
            await (direct or self._app)(scope, receive, sender)
        finally:
            self._observe(scope, sender.status, time.perf_counter() - started)


class _Sender:
    """The `send` of one request behind the edge: puts its id on the reply, and notes the reply's status."""

    __slots__ = ("_process", "_send", "_write", "request_id", "status")

    def __init__(self, send: Send, scope: Scope, request_id: bytes, process: Drainable) -> None:
        self.request_id = request_id
        self.status = 499  # what the log of a proxy calls a caller that hung up before the reply
        self._send = send
        self._process = process
        # Taken out, because it refers to the scope: a reference cycle for each request would wait for the collector.
        whole = scope.get("extensions", {}).pop(WHOLE, None)
        self._write: WriteWhole | None = None if whole is None else whole["write"]

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message["headers"], (b"x-request-id", self.request_id)]
            if self._process.draining:
                headers.append((b"connection", b"close"))
            message["headers"] = headers
        await self._send(message)

    def at_once(self, headers: Sequence[tuple[bytes, bytes]], parts: Sequence[bytes]) -> bool:
        """Writes a whole reply of status 200. Returns False if the connection cannot take it in one go.

        uvicorn checks each header of a reply that is sent message by message, which costs as much as the rest of a
        cached answer. Here only the lines are counted: a header that holds a line end sends the reply the other way,
        where it fails.
        """
        if self._write is None or self._process.draining:
            return False
        head = b"".join([b"%b: %b\r\n" % header for header in headers])
        if head.count(b"\n") != len(headers):
            return False
        if not self._write(b"%bx-request-id: %b\r\n" % (head, self.request_id), parts):
            return False
        self.status = 200
        return True


def _request_id(scope: Scope) -> bytes:
    given = header(scope, REQUEST_ID_HEADER)
    if given is not None and len(given) <= MAX_REQUEST_ID_CHARS:
        raw = given.encode("latin-1")
        if _PLAIN_ID.fullmatch(raw):
            return raw
    return b"%b%08x" % (_ID_PREFIX, next(_ID_COUNTER) & 0xFFFFFFFF)
