"""Reads the environment once, takes the port, and keeps the workers that serve on it (`server.py`)."""

from __future__ import annotations

import asyncio
import logging
import sys
from functools import partial
from typing import TYPE_CHECKING

from embedding_common.http.bind import bind
from embedding_service.config import Settings, SettingsError, from_environment
from embedding_service.observability.scoreboard import Board, withdraw
from embedding_service.process.supervisor import Supervisor

if TYPE_CHECKING:
    import socket

CLOSE_S = 5.0  # for connections, queued writes and the interpreter, after draining and finishing


def main() -> None:
    """Exits with 2 and one line a variable if the environment is wrong, with 1 and one line if the port is taken."""
    try:
        settings = from_environment()
    except SettingsError as wrong:
        sys.exit(_complain(2, wrong))
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(process)d %(name)s %(message)s")
    try:
        listener = bind(settings.host, settings.port, variables="HOST, PORT")
    except OSError as taken:
        sys.exit(_complain(1, taken))
    sys.exit(asyncio.run(_supervise(settings, listener)))


async def _supervise(settings: Settings, listener: socket.socket) -> int:
    board_fd = Board.file()
    supervisor = Supervisor(
        listener=listener,
        board_fd=board_fd,
        workers=settings.workers,
        stop_within_s=settings.drain_s + settings.stop_s + CLOSE_S,
        ended=partial(withdraw, board_fd),
    )
    return await supervisor.run()


def _complain(code: int, trouble: Exception) -> int:
    for line in str(trouble).splitlines():
        sys.stderr.write(f"embedding-service: {line}\n")
    return code


if __name__ == "__main__":
    main()
