"""Reads the environment once and runs the gateway."""

from __future__ import annotations

import logging
import sys

import uvicorn

from embedding_service.app import build_service, create_app
from embedding_service.config import Settings, SettingsError, from_environment
from ml_base.asgi import DrainingServer

KEEP_ALIVE_S = 75  # longer than the pools of common clients and balancers, so that they are the ones to close


def main() -> None:
    """Exits with 2 and one line a variable if the environment is wrong."""
    try:
        settings = from_environment()
    except SettingsError as wrong:
        sys.exit(_complain(wrong))
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    serve(settings)


def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT, then drains."""
    service = build_service(settings)
    config = uvicorn.Config(
        create_app(service),
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        access_log=False,  # a line a request would cost as much as a cached answer; /metrics counts them
        log_config=None,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        backlog=2048,
    )
    DrainingServer(config, drain_s=settings.drain_s, finish_s=settings.stop_s, on_drain=service.drain).run()


def _complain(wrong: SettingsError) -> int:
    for line in str(wrong).splitlines():
        sys.stderr.write(f"embedding-service: {line}\n")
    return 2


if __name__ == "__main__":
    main()
