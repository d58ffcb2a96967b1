"""One project for all tests that need running containers: a test that breaks a part repairs it before it ends."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.system.compose.project import REPLICAS, Project, run

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def project() -> Iterator[Project]:
    _need_docker()
    name = f"embedding-test-{secrets.token_hex(3)}"
    ports = dict(zip(("EMBEDDING_PORT", "ML_PORT", "STATS_PORT"), _free_ports(3), strict=True))
    project = Project(name, {**ports, "SUTRA_NETWORK": name, "ML_BASE_REPLICAS_PER_HOST": str(REPLICAS)})
    try:
        project.compose("build")
        try:
            project.up()
        except AssertionError as failed:
            pytest.fail(f"{failed}\n{project.compose('logs', '--tail', '40')}")
        yield project
    finally:
        project.compose("down", "--volumes")
        # `down --rmi local` leaves them (Compose 5.6, engine 20.10)
        run("docker", "image", "rm", f"{name}-embedding", f"{name}-ml-base", check=False)


def _need_docker() -> None:
    """Skips without an engine, unless EMBED_REQUIRE_DOCKER says that there must be one."""
    try:
        answers = subprocess.run(["docker", "info"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        answers = False
    if answers:
        return
    if os.environ.get("EMBED_REQUIRE_DOCKER") == "1":
        pytest.fail("no Docker engine answers, and EMBED_REQUIRE_DOCKER=1")
    pytest.skip("no Docker engine answers")


def _free_ports(count: int) -> list[str]:
    """Held together while they are chosen, so that they differ."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [str(each.getsockname()[1]) for each in sockets]
