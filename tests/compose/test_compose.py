"""`docker compose up --wait` from the root, for real: images built, three replicas, vectors through the whole path."""

from __future__ import annotations

import contextlib
import csv
import os
import secrets
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
REPLICAS = 3

# Building the model image takes minutes where its layers are not cached yet.
pytestmark = [pytest.mark.compose, pytest.mark.timeout(1500)]


@dataclass(frozen=True, slots=True)
class Stack:
    """A project of its own beside whatever else runs on this machine."""

    project: str
    environment: dict[str, str]

    def compose(self, *arguments: str) -> str:
        """What `docker compose ARGUMENTS` prints; fails with what it complains about."""
        done = subprocess.run(
            ["docker", "compose", "-p", self.project, "--progress", "plain", *arguments],
            cwd=ROOT,
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"docker compose {' '.join(arguments)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        return done.stdout

    def url(self, port: str, path: str) -> str:
        return f"http://127.0.0.1:{self.environment[port]}{path}"


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    _need_docker()
    name = f"embedding-test-{secrets.token_hex(3)}"
    ports = dict(zip(("EMBEDDING_PORT", "ML_PORT", "STATS_PORT"), _free_ports(3), strict=True))
    stack = Stack(name, {**ports, "SUTRA_NETWORK": name, "ML_BASE_REPLICAS_PER_HOST": str(REPLICAS)})
    try:
        stack.compose("build")
        _up(stack)
        yield stack
    finally:
        stack.compose("down", "--volumes")
        images = [f"{name}-embedding", f"{name}-ml-base"]  # `down --rmi local` leaves them (Compose 5.6, engine 20.10)
        subprocess.run(["docker", "image", "rm", *images], capture_output=True, check=False)


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


def _up(stack: Stack) -> None:
    try:
        stack.compose("up", "--detach", "--wait", "--wait-timeout", "240")
    except AssertionError as failed:
        pytest.fail(f"{failed}\n{stack.compose('logs', '--tail', '40')}")


def _free_ports(count: int) -> list[str]:
    """Held together while they are chosen, so that they differ."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [str(each.getsockname()[1]) for each in sockets]


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=60, trust_env=False) as client:
        yield client


def test_every_service_is_healthy_with_three_replicas(stack: Stack) -> None:
    rows = [row.split() for row in stack.compose("ps", "--format", "{{.Service}} {{.Health}}").splitlines()]
    assert sorted(rows) == sorted(
        [[service, "healthy"] for service in ["embedding", "ml-base-lb", "redis-cache", *["ml-base"] * REPLICAS]]
    )


def test_the_balancer_sees_three_replicas_up(stack: Stack, client: httpx.Client) -> None:
    table = client.get(stack.url("STATS_PORT", "/stats;csv")).text
    status = {row["svname"]: row["status"] for row in csv.DictReader(table.lstrip("# ").splitlines())}
    assert [name for name in status if name.startswith("ml-base-") and status[name] == "UP"] == [
        f"ml-base-{number}" for number in range(1, REPLICAS + 1)
    ]


def test_the_runtime_socket_answers_show_stat(stack: Stack) -> None:
    with socket.create_connection(("127.0.0.1", int(stack.environment["STATS_PORT"])), timeout=10) as connection:
        connection.sendall(b"show stat\n")
        answer = connection.makefile("rb").read().decode()
    assert answer.startswith("# pxname,svname,")


def test_a_text_is_embedded_once_and_then_cached(stack: Stack, client: httpx.Client) -> None:
    url, body = stack.url("EMBEDDING_PORT", "/embed"), {"texts": ["The quick brown fox"]}
    first, second = client.post(url, json=body).json(), client.post(url, json=body).json()
    assert (first["dimension"], len(first["embeddings"][0])) == (384, 384)
    assert (first["cached_count"], second["cached_count"]) == (0, 1)
    assert first["embeddings"] == second["embeddings"]


def test_the_balancers_port_embeds_too_uncached(stack: Stack, client: httpx.Client) -> None:
    body = {"texts": ["The slow red fox"]}
    through_gateway = client.post(stack.url("EMBEDDING_PORT", "/embed"), json=body).json()
    direct = client.post(stack.url("ML_PORT", "/embed"), json=body).json()
    assert direct["cached_count"] == 0
    assert direct["embeddings"][0] == pytest.approx(through_gateway["embeddings"][0], abs=1e-5)


def test_the_gateway_is_connected_to_both_sides(stack: Stack, client: httpx.Client) -> None:
    assert client.get(stack.url("EMBEDDING_PORT", "/health")).json()["ml_base_connected"] is True
    assert client.get(stack.url("EMBEDDING_PORT", "/cache/stats")).json()["l2"]["connected"] is True


def test_no_process_is_root(stack: Stack) -> None:
    for service in ("embedding", "ml-base", "ml-base-lb", "redis-cache"):
        assert stack.compose("exec", "-T", service, "id", "-u").strip() != "0"


def test_a_stopped_stack_has_ended_cleanly_and_finds_its_vectors_when_it_is_back(
    stack: Stack, client: httpx.Client
) -> None:
    url, body = stack.url("EMBEDDING_PORT", "/embed"), {"texts": ["The third fox sleeps"]}
    before = client.post(url, json=body).json()
    stack.compose("stop")
    ended = stack.compose("ps", "--all", "--format", "{{.Service}} {{.ExitCode}}").splitlines()
    _up(stack)
    after = client.post(url, json=body).json()
    assert {line.split()[1] for line in ended} == {"0"}, ended
    assert after["cached_count"] == 1
    assert after["embeddings"] == before["embeddings"]
