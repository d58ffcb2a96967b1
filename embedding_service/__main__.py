"""Reads the environment once, takes the port, and keeps the workers that serve on it (`process/worker.py`)."""

from __future__ import annotations

import asyncio
import logging
import sys
from functools import partial
from typing import TYPE_CHECKING

from embedding_common import command_line
from embedding_common.http.bind import bind
from embedding_service.config import Settings
from embedding_service.observability.scoreboard import Scoreboard, withdraw
from embedding_service.process.supervisor import Supervisor

if TYPE_CHECKING:
    import socket

PROGRAM = "embedding-service"
CLOSE_S = 5.0
"""The time, in seconds, for connections, queued writes and the interpreter to close after draining and finishing."""


def main() -> None:
    """Exits with 2 and one line for each wrong variable, or with 1 and one line if the port is taken."""
    settings = command_line.start(
        PROGRAM,
        Settings,
        command=PROGRAM,
        description="The gateway: answers embedding requests from its caches, and has the rest computed by replicas.",
    )
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(process)d %(name)s %(message)s")
    try:
        listener = bind(settings.host, settings.port, variables="HOST, PORT")
    except OSError as taken:
        command_line.end(PROGRAM, command_line.EXIT_FAILED, taken)
    sys.exit(asyncio.run(_supervise(settings, listener)))


async def _supervise(settings: Settings, listener: socket.socket) -> int:
    scoreboard_fd = Scoreboard.file()
    supervisor = Supervisor(
        listener=listener,
        scoreboard_fd=scoreboard_fd,
        workers=settings.workers,
        stop_within_s=settings.drain_s + settings.stop_s + CLOSE_S,
        on_worker_end=partial(withdraw, scoreboard_fd),
    )
    return await supervisor.run()


if __name__ == "__main__":
    main()
