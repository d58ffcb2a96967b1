"""Reads the environment once and runs the gateway."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import socket
import sys
from functools import partial

import uvicorn

from embedding_service.app import build_service, create_app
from embedding_service.board import Board
from embedding_service.config import Settings, SettingsError, from_environment
from embedding_service.metrics import Metrics, shared_board
from embedding_service.workers import Place, Supervisor, end_with_parent
from ml_base.asgi import DrainingServer, bind

CLOSE_S = 5.0  # for connections, queued writes and the interpreter, after draining and finishing
KEEP_ALIVE_S = 75  # longer than the pools of common clients and balancers, so that they are the ones to close


def main() -> None:
    """Exits with 2 and one line a variable if the environment is wrong, with 1 and one line if the port is taken."""
    options = argparse.ArgumentParser(
        prog="embedding-service", description="The gateway; set by environment variables."
    )
    options.add_argument("--worker", type=Place.from_argument, help=argparse.SUPPRESS)  # said by the supervisor
    place: Place | None = options.parse_args().worker
    try:
        settings = from_environment()
    except SettingsError as wrong:
        sys.exit(_complain(2, wrong))
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(process)d %(name)s %(message)s")
    if place is not None:
        _work(settings, place)
        return
    try:
        listener = bind(settings.host, settings.port, variables="HOST, PORT")
    except OSError as taken:
        sys.exit(_complain(1, taken))
    if settings.workers == 1:
        _serve(settings, listener, Metrics())
    else:
        _supervise(settings, listener)


def _supervise(settings: Settings, listener: socket.socket) -> None:
    stop_within_s = settings.drain_s + settings.stop_s + CLOSE_S

    async def run() -> None:
        supervisor = Supervisor(
            listener=listener, board_fd=Board.file(), slots=settings.workers, stop_within_s=stop_within_s
        )
        await supervisor.run()

    asyncio.run(run())


def _work(settings: Settings, place: Place) -> None:
    board = shared_board(fd=place.board_fd, slots=place.slots, slot=place.slot)
    listener = socket.socket(fileno=place.listen_fd)
    _serve(settings, listener, Metrics(board), lifeline_fd=place.lifeline_fd)


def _serve(settings: Settings, listener: socket.socket, metrics: Metrics, *, lifeline_fd: int | None = None) -> None:
    """Serves until SIGTERM or SIGINT, then drains."""
    service = build_service(settings, metrics)
    app = create_app(service, started=None if lifeline_fd is None else partial(end_with_parent, lifeline_fd))
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        access_log=False,  # a line a request would cost as much as a cached answer; /metrics counts them
        log_config=None,
        server_header=False,
        proxy_headers=False,  # nobody here asks for the caller's address
        timeout_keep_alive=KEEP_ALIVE_S,
        backlog=2048,
    )
    gc.collect()
    gc.freeze()  # what was imported stays: to walk over it again and again would hold the loop for tens of ms each time
    server = DrainingServer(config, drain_s=settings.drain_s, finish_s=settings.stop_s, on_drain=service.drain)
    server.run(sockets=[listener])


def _complain(code: int, trouble: Exception) -> int:
    for line in str(trouble).splitlines():
        sys.stderr.write(f"embedding-service: {line}\n")
    return code


if __name__ == "__main__":
    main()
