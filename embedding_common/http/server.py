"""The server around an ASGI app, the same for both processes: how uvicorn is configured, and how it drains."""

from __future__ import annotations

import logging
import os
import signal
import time
from typing import TYPE_CHECKING

import uvicorn

from embedding_common.http.limits import LimitedProtocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from starlette.types import ASGIApp

    from embedding_common.http.limits import Limits

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 75
"""How long an idle connection stays open. That is longer than HAProxy and common clients keep one in their pools, so
that it is never the server that closes one just as a request is sent down it."""

SWEEP_TICKS = 10
"""Connections are checked every so many ticks of uvicorn, which come ten times a second."""


def configure(app: ASGIApp, limits: Limits) -> uvicorn.Config:
    """Returns uvicorn's configuration for `app`."""
    return uvicorn.Config(
        app,
        loop="uvloop",
        http=LimitedProtocol.with_limits(limits),
        ws="none",
        lifespan="on",
        access_log=False,  # a line for each request would cost as much as a cached answer; /metrics counts them
        log_config=None,
        server_header=False,
        proxy_headers=False,  # the caller's address is used nowhere
        timeout_keep_alive=KEEP_ALIVE_S,
        backlog=2048,
    )


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

    def retire(self) -> None:
        """Drains beside a successor that listens on the same socket: all that comes from now on goes to that one."""
        for listening in self.servers:
            listening.close()
        self.handle_exit(signal.SIGHUP, None)

    async def on_tick(self, counter: int) -> bool:
        if self._stop_at is not None:
            late_s = time.monotonic() - self._stop_at
            in_hand = bool(self.server_state.tasks)
            self.should_exit = self.should_exit or late_s >= (self._finish_s if in_hand else 0)
        if counter % SWEEP_TICKS == 0:
            now = time.monotonic()
            for connection in list(self.server_state.connections):
                if isinstance(connection, LimitedProtocol):
                    connection.sweep(now)
        return await super().on_tick(counter)
