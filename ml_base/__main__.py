"""The command `ml-base`, also `python -m ml_base`: reads the environment, loads the model, listens, drains.

The command line and the environment are looked at first. The imports that need the extra `ml-base`, or take a second,
follow inside the functions, so that a mistake or `--help` is answered at once and everywhere.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING

from embedding_common import command_line
from embedding_common.http.bind import bind
from ml_base.config import Settings

if TYPE_CHECKING:
    import socket

    from ml_base.app import Replica

PROGRAM = "ml-base"
_LIBRARIES = ("sentence_transformers", "torch")  # OpenVINO is optional: without it torch computes


def main() -> None:
    """Exits with 2 and one line for each wrong variable, or with 1 and one line if the replica cannot start."""
    settings = start(PROGRAM, "A model server: turns texts into vectors, in batches.")
    for ending in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending, _leave)  # uvicorn takes over once it runs
    try:
        listener = bind(settings.host, settings.port, variables="ML_BASE_HOST, ML_BASE_PORT")
        replica = _build(settings)
    except OSError as reason:
        command_line.end(PROGRAM, command_line.EXIT_FAILED, reason)
    _serve(replica, listener)
    _end()


def start(command: str, description: str) -> Settings:
    """Returns the settings, with the log set up, unless the process has to end: see `command_line.start`.

    Exits with 1 and one line if the libraries that compute are not installed.
    """
    settings = command_line.start(PROGRAM, Settings, command=command, description=description)
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        command_line.end(
            PROGRAM,
            command_line.EXIT_FAILED,
            f"{' and '.join(missing)} cannot be imported; install them with: pip install 'embedding-service[ml-base]'",
        )
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    return settings


def _build(settings: Settings) -> Replica:
    """Raises `OSError` if a model cannot be had."""
    import prometheus_client  # noqa: PLC0415

    from ml_base import wiring  # noqa: PLC0415
    from ml_base.models.loading import ModelUnavailableError  # noqa: PLC0415

    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs a line for each file of a model from the hub
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # halves the series; these are unused
    try:
        return wiring.build(settings)
    except ModelUnavailableError as reason:
        command_line.end(PROGRAM, command_line.EXIT_FAILED, reason)


def _serve(replica: Replica, listener: socket.socket) -> None:
    from embedding_common.http.limits import Limits  # noqa: PLC0415
    from embedding_common.http.server import DrainingServer, configure  # noqa: PLC0415
    from ml_base.app import create_app  # noqa: PLC0415

    settings = replica.settings
    config = configure(create_app(replica), Limits(body_bytes=settings.max_body_bytes))
    server = DrainingServer(config, drain_s=settings.drain_s, finish_s=settings.finish_s, on_drain=replica.drain)
    server.run(sockets=[listener])


def _end() -> None:
    """Ends a process that has closed all it owned, without the interpreter's own end.

    There, a thread that still is in a numeric library, or has just left it, can meet destructors that have run: the
    process then aborts with 134 instead of 0 (seen when a Compose stack was stopped).
    """
    logging.shutdown()
    sys.stderr.flush()
    os._exit(0)


def _leave(*_: object) -> None:
    os._exit(0)  # nothing is in hand while the model loads


if __name__ == "__main__":
    main()
