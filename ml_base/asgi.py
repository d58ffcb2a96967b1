"""The HTTP edge both servers share: request ids, bodies with a limit, JSON refusals, draining."""

from __future__ import annotations

import itertools
import logging
import os
import re
import secrets
import socket
import time
from typing import TYPE_CHECKING

import uvicorn
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ml_base import errors, native
from ml_base.wire import REQUEST_ID_HEADER

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
    from types import FrameType

    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

JOIN_BYTES = 1 << 18  # below it one copy costs less than the system call that each part is sent with
MAX_REQUEST_ID_CHARS = 128
# Eight random digits of this process, eight that count: unique without a system call for each request.
_ID_PREFIX = secrets.token_hex(4).encode()
_ID_COUNTER = itertools.count(secrets.randbits(32))
_PLAIN_ID = re.compile(rb"[\x21-\x7e]+")  # what may be logged and sent back without escaping


def header(scope: Scope, name: str) -> str | None:
    """The first value of a header, or None."""
    wanted = name.encode()
    for key, value in scope["headers"]:
        if key == wanted:
            return str(value, "latin-1")
    return None


async def read_body(scope: Scope, receive: Receive, *, limit_bytes: int) -> bytes:
    """The whole body. Raises `BodyTooLarge` as soon as that is known, `ClientGone` if the caller hangs up."""
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
        if not message.get("more_body", False):
            return part if not parts else b"".join((*parts, part))
        parts.append(part)


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
    """A whole reply. A large one goes out part by part, so that it is never copied into one piece."""
    length = sum(map(len, parts))
    if length <= JOIN_BYTES:
        parts = [b"".join(parts)]
    start = [(b"content-type", content_type.encode()), (b"content-length", b"%d" % length), *headers]
    await send({"type": "http.response.start", "status": status, "headers": start})
    last = len(parts) - 1
    for index, part in enumerate(parts):
        await send({"type": "http.response.body", "body": part, "more_body": index < last})


async def send_problem(send: Send, problem: errors.Problem, request_id: str) -> None:
    """A refusal in the native dialect."""
    status, body = native.error_body(problem, request_id)
    headers = []
    if problem.retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % max(1, round(problem.retry_after_s))))
    if status == 413:  # noqa: PLR2004 - the rest of the body is unread: the connection cannot carry another request
        headers.append((b"connection", b"close"))
    await send_bytes(send, status, [body], headers=headers)


def guarded(endpoint: Callable[[Scope, Receive, Send], Awaitable[None]]) -> ASGIApp:
    """An ASGI app around `endpoint` that answers every exception: known ones by table, others with a plain 500."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        request_id = scope["state"]["request_id"]
        try:
            await endpoint(scope, receive, send)
        except errors.Problem as problem:
            await send_problem(send, problem, request_id)
        except errors.ClientGone:
            log.info("request_id=%s the caller hung up", request_id)
        except Exception:
            log.exception("request_id=%s failed", request_id)
            generic = errors.InferenceFailed("internal error; the log has the detail under this request_id")
            await send_problem(send, generic, request_id)

    return app


def answer_unknown_routes(app: FastAPI) -> None:
    """Refusals by the router itself (404, 405) in the same JSON shape as all others."""

    async def refuse(request: Request, refusal: HTTPException) -> Response:
        allowed = (refusal.headers or {}).get("allow") or (refusal.headers or {}).get("Allow")
        if allowed is not None:
            reply = native.ErrorReply(
                error=f"method: {request.url.path} takes {allowed}, got {request.method}",
                error_type="Validation",
                field="method",
                limit=allowed,
                value=request.method,
            )
        else:
            reply = native.ErrorReply(
                error=f"path: {request.url.path[:200]} is not served here; see /docs",
                error_type="Validation",
                field="path",
                value=request.url.path[:200],
            )
        reply.request_id = request.scope["state"]["request_id"]
        return Response(
            reply.model_dump_json(exclude_none=True), refusal.status_code, refusal.headers, "application/json"
        )

    app.add_exception_handler(HTTPException, refuse)  # type: ignore[arg-type]  # Starlette types handlers by Exception


class Edge:
    """Outermost ASGI layer: gives each request an id, puts it on the reply.

    `observe(scope, status, seconds)` is called once a request, when its reply is out or its caller has gone.

    `direct` holds the apps of paths whose cost counts: a POST to exactly such a path goes straight there. The framework
    has the same path for its OpenAPI document and for 405, and answers everything else.

    While `draining()` is true every reply closes its connection, so that a balancer opens the next one elsewhere.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        direct: Mapping[str, ASGIApp],
        observe: Callable[[Scope, int, float], None],
        draining: Callable[[], bool],
    ) -> None:
        self._app = app
        self._direct = direct
        self._observe = observe
        self._draining = draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id.decode()
        started = time.perf_counter()
        status = 499  # what the log of a proxy calls a caller that hung up before the reply

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message["headers"], (b"x-request-id", request_id)]
                if self._draining():
                    headers.append((b"connection", b"close"))
                message["headers"] = headers
            await send(message)

        direct = self._direct.get(scope["path"]) if scope["method"] == "POST" else None
        try:
            await (direct or self._app)(scope, receive, send_with_id)
        finally:
            self._observe(scope, status, time.perf_counter() - started)


def _request_id(scope: Scope) -> bytes:
    given = header(scope, REQUEST_ID_HEADER)
    if given is not None and len(given) <= MAX_REQUEST_ID_CHARS:
        raw = given.encode("latin-1")
        if _PLAIN_ID.fullmatch(raw):
            return raw
    return b"%b%08x" % (_ID_PREFIX, next(_ID_COUNTER) & 0xFFFFFFFF)


def bind(host: str, port: int, *, variables: str) -> socket.socket:
    """Takes the port, without listening yet: connections are refused until a server listens on it.

    Raises `OSError` with one line that names the variables to change.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as problem:
        listener.close()
        raise OSError(f"cannot listen on {host} port {port} ({variables}): {problem.strerror}") from None
    return listener


class DrainingServer(uvicorn.Server):
    """Serves on for `drain_s` after the first SIGTERM or SIGINT, up to `finish_s` longer while requests are in hand,
    and exits with 0. The port stays open until then: a balancer that is refused takes the server for dead, and cuts
    off what it still has in hand.

    `on_drain` is called at the first signal: from then on health answers 503, so that the balancer takes the
    server out of rotation while it still serves what arrives. A second signal stops at once.
    """

    def __init__(
        self, config: uvicorn.Config, *, drain_s: float, finish_s: float, on_drain: Callable[[], None]
    ) -> None:
        config.timeout_graceful_shutdown = 1  # for connections to close: what was in hand has been waited for
        super().__init__(config)
        self._drain_s = drain_s
        self._finish_s = finish_s
        self._on_drain = on_drain
        self._stop_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        if not self.started:
            os._exit(0)  # nothing is in hand yet, and a model that loads in a thread cannot be interrupted
        if self._stop_at is not None:
            self.should_exit = self.force_exit = True
            return
        log.info("signal %d: draining for %.1f s", sig, self._drain_s)
        self._on_drain()
        self._stop_at = time.monotonic() + self._drain_s

    async def on_tick(self, counter: int) -> bool:
        if self._stop_at is not None:
            late_s = time.monotonic() - self._stop_at
            in_hand = bool(self.server_state.tasks)
            self.should_exit = self.should_exit or late_s >= (self._finish_s if in_hand else 0)
        return await super().on_tick(counter)
