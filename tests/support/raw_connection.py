"""A server whose connections have limits, and callers that write raw bytes to it over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import TYPE_CHECKING, Any, Self

import uvicorn
from uvicorn.server import ServerState

from embedding_common.http import edge
from embedding_common.http.limits import LimitedProtocol, Limits

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

LIMITS = Limits(head_bytes=2000, head_s=10, body_s=60, body_bytes=50_000, unread_s=30)
HEAD = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\n"
EARLY = HEAD.replace(b"/", b"/early", 1)
UPGRADE_ONLY = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nupgrade: h2c\r\n\r\n"


class Steady:
    """A process that is never told to stop."""

    draining = False


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
        self._edge = edge.Edge(edge.guarded(self.echo), direct={}, observe=lambda *_: None, process=Steady())
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
