"""One worker: a gateway process that serves on the socket of the supervisor (`workers.py`) that has started it."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import sys

import uvicorn

from embedding_common.http.edge import DrainingServer
from embedding_common.http.protocol import LimitedProtocol, Limits
from embedding_service.app import build_service, create_app
from embedding_service.config import Settings, from_environment
from embedding_service.observability.metrics import Metrics, shared_board
from embedding_service.process.supervisor import Place, end_with_parent, tell

KEEP_ALIVE_S = 75  # longer than the pools of common clients and balancers, so that they are the ones to close


def main() -> None:
    """The environment is the supervisor's, which has checked it."""
    settings = from_environment()
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(process)d %(name)s %(message)s")
    serve(settings, Place.from_argument(sys.argv[1]))


def serve(settings: Settings, place: Place) -> None:
    """Until SIGTERM or SIGINT, then drains; at SIGHUP leaves what comes to its successor, and drains."""
    metrics = Metrics(shared_board(fd=place.board_fd, slots=place.rows, slot=place.row))
    service = build_service(settings, metrics)

    def started() -> None:
        end_with_parent(place.lifeline_fd)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, server.retire)
        tell(place.word_fd, ready=not service.unready())

    config = uvicorn.Config(
        create_app(service, started=started),
        loop="uvloop",
        http=LimitedProtocol.with_limits(Limits(body_s=settings.body_timeout_s, body_bytes=settings.max_body_bytes)),
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
    server.run(sockets=[socket.socket(fileno=place.listen_fd)])
    metrics.publish()  # our parent takes off the board what we held, and what we counted stays


if __name__ == "__main__":
    main()
