"""`python -m ml_base`: read the environment, load the model, listen, drain."""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import TYPE_CHECKING

import prometheus_client
import uvicorn

from embedding_common.http.bind import bind
from embedding_common.http.edge import DrainingServer
from embedding_common.http.protocol import LimitedProtocol, Limits
from ml_base import wiring
from ml_base.app import create_app
from ml_base.config import ConfigError, read_environment
from ml_base.models import loading

if TYPE_CHECKING:
    import socket

    from ml_base.app import Replica

KEEP_ALIVE_S = 75
"""Longer than HAProxy keeps an idle connection in its pool, so that it is never the replica that closes one just as
a request is sent down it."""

log = logging.getLogger("ml_base")


def main() -> None:
    try:
        settings = read_environment()
    except ConfigError as wrong:
        sys.exit(_refuse(2, wrong))
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # one line a file of a model from the hub
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]  # halves the series: nobody reads them
    for ending in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending, _leave)  # uvicorn takes over once it runs
    try:
        listener = bind(settings.host, settings.port, variables="ML_BASE_HOST, ML_BASE_PORT")
        replica = wiring.build(settings)
    except (OSError, loading.ModelUnavailableError) as trouble:
        sys.exit(_refuse(1, trouble))
    _serve(replica, listener)
    _end()


def _serve(replica: Replica, listener: socket.socket) -> None:
    config = uvicorn.Config(
        create_app(replica),
        loop="uvloop",
        http=LimitedProtocol.with_limits(Limits(body_bytes=replica.settings.max_body_bytes)),
        ws="none",
        lifespan="on",
        access_log=False,  # one line an embed request is logged with what matters; health checks are noise
        log_config=None,
        server_header=False,
        proxy_headers=False,  # nobody here asks for the caller's address
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    settings = replica.settings
    server = DrainingServer(config, drain_s=settings.drain_s, finish_s=settings.finish_s, on_drain=replica.drain)
    server.run(sockets=[listener])


def _end() -> None:
    """Ends a process that has closed all it owned, past the interpreter's own end.

    There, a thread that still is in a numeric library, or has just left it, can meet destructors that have run: the
    process then aborts with 134 instead of 0 (seen when a Compose stack was stopped).
    """
    logging.shutdown()
    sys.stderr.flush()
    os._exit(0)


def _leave(*_: object) -> None:
    os._exit(0)  # nothing is in hand while the model loads


def _refuse(code: int, trouble: Exception) -> int:
    sys.stderr.write(f"ml-base: {trouble}\n")
    return code


if __name__ == "__main__":
    main()
