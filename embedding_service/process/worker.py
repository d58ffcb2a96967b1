"""One worker: a gateway process that serves on the socket of the supervisor (`supervisor.py`) that has started it."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import sys

from embedding_common.http.limits import Limits
from embedding_common.http.server import DrainingServer, configure
from embedding_common.settings import read_environment
from embedding_service.api.routes import metric_labels
from embedding_service.app import build_service, create_app
from embedding_service.config import Settings
from embedding_service.observability.metrics import Metrics, shared_scoreboard
from embedding_service.process.supervisor import WorkerInheritance, end_with_parent, report_serving


def main() -> None:
    """Serves with the supervisor's environment, which has been checked there."""
    settings = read_environment(Settings)
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(process)d %(name)s %(message)s")
    serve(settings, WorkerInheritance.from_argument(sys.argv[1]))


def serve(settings: Settings, inherited: WorkerInheritance) -> None:
    """Serves until SIGTERM or SIGINT, then drains; at SIGHUP leaves new connections to its successor, and drains."""
    metrics = Metrics(
        shared_scoreboard(fd=inherited.scoreboard_fd, slots=inherited.rows, slot=inherited.row), routes=metric_labels()
    )
    service = build_service(settings, metrics)

    def started() -> None:
        end_with_parent(inherited.lifeline_fd)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, server.retire)
        report_serving(inherited.report_fd, ready=not service.unready())

    limits = Limits(body_s=settings.body_timeout_s, body_bytes=settings.max_body_bytes)
    config = configure(create_app(service, started=started), limits)
    gc.collect()
    gc.freeze()  # imports stay; without this each collection walks over them, and holds the loop for tens of ms
    server = DrainingServer(config, drain_s=settings.drain_s, finish_s=settings.stop_s, on_drain=service.drain)
    server.run(sockets=[socket.socket(fileno=inherited.listen_fd)])
    metrics.publish()  # our parent withdraws our gauges from the scoreboard; what we have counted stays


if __name__ == "__main__":
    main()
