from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING

import uvicorn

from embedding_common.http.server import DrainingServer

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send


async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
    return


class Drained:
    """A server that has started, without a socket."""

    def __init__(self, *, drain_s: float) -> None:
        self.drains = 0
        config = uvicorn.Config(nothing, log_config=None)
        self.server = DrainingServer(config, drain_s=drain_s, finish_s=60, on_drain=self.note)
        self.server.started = True

    def note(self) -> None:
        self.drains += 1

    async def tick(self) -> bool:
        return await self.server.on_tick(1)


async def test_the_first_signal_drains_and_the_server_leaves_when_the_drain_is_over() -> None:
    drained = Drained(drain_s=60)
    assert not await drained.tick()
    drained.server.handle_exit(signal.SIGTERM, None)
    assert drained.drains == 1
    assert not await drained.tick()
    drained.server._stop_at = 0.0
    assert await drained.tick()
    assert not drained.server.force_exit


async def test_a_drained_server_stays_open_while_a_request_is_in_hand_but_not_for_ever() -> None:
    drained = Drained(drain_s=0)
    request = asyncio.create_task(asyncio.Event().wait())
    drained.server.server_state.tasks.add(request)
    drained.server.handle_exit(signal.SIGTERM, None)
    assert not await drained.tick()
    drained.server._finish_s = 0
    assert await drained.tick()
    request.cancel()


async def test_a_second_signal_stops_at_once() -> None:
    drained = Drained(drain_s=60)
    drained.server.handle_exit(signal.SIGINT, None)
    drained.server.handle_exit(signal.SIGINT, None)
    assert await drained.tick()
    assert (drained.drains, drained.server.force_exit) == (1, True)
