"""A Compose project under test, what is asked of its containers, and load that counts its failures."""

from __future__ import annotations

import csv
import itertools
import json
import os
import socket
import subprocess
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOT = Path(__file__).resolve().parents[3]
REPLICAS = 3
_fresh = itertools.count()


def run(*command: str, check: bool = True, **environment: str) -> str:
    """What a command in the project's folder prints; fails with what it complains about."""
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, f"{' '.join(command)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


def fresh_text() -> str:
    return f"text number {next(_fresh)} of this test run"


def eventually(condition: Callable[[], bool], what: str, *, within_s: float = 60) -> None:
    give_up_at = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < give_up_at, f"not within {within_s} s: {what}"
        time.sleep(0.2)


@dataclass(frozen=True, slots=True)
class Project:
    """A project of its own beside whatever else runs on this machine. `environment`: ports, network, replicas."""

    name: str
    environment: dict[str, str]

    def compose(self, *arguments: str) -> str:
        return run("docker", "compose", "-p", self.name, "--progress", "plain", *arguments, **self.environment)

    def up(self, *arguments: str) -> None:
        self.compose("up", "--detach", "--wait", "--wait-timeout", "240", *arguments)

    def scale(self, replicas: int) -> None:
        self.up("--no-recreate", "--scale", f"ml-base={replicas}")

    def containers(self, service: str) -> list[str]:
        return self.compose("ps", "--quiet", service).split()

    def inspect(self, service: str) -> list[dict[str, Any]]:
        return list(json.loads(run("docker", "inspect", *self.containers(service))))

    def port(self, name: str) -> int:
        return int(self.environment[name])

    def url(self, port: str, path: str) -> str:
        return f"http://127.0.0.1:{self.environment[port]}{path}"

    def embed(self, texts: Sequence[str], *, port: str = "EMBEDDING_PORT") -> dict[str, Any]:
        with httpx.Client(timeout=60, trust_env=False) as client:
            reply = client.post(self.url(port, "/embed"), json={"texts": list(texts)})
        assert reply.status_code == 200, reply.text
        return dict(reply.json())

    def get(self, port: str, path: str) -> httpx.Response:
        return httpx.get(self.url(port, path), timeout=10, trust_env=False)

    def replicas_up(self) -> int:
        """As the balancer sees them."""
        rows = csv.DictReader(self.get("STATS_PORT", "/stats;csv").text.lstrip("# ").splitlines())
        return sum(row["svname"].startswith("ml-base-") and row["status"] == "UP" for row in rows)

    def redis_connected(self) -> bool:
        return self.get("EMBEDDING_PORT", "/cache/stats").json()["l2"]["connected"] is True


class Load:
    """New texts from some callers at once, as long as the block lasts; counts replies by status or exception."""

    def __init__(self, project: Project, *, callers: int = 6, texts: int = 2) -> None:
        self.replies: Counter[int | str] = Counter()
        self.slowest_s = 0.0
        self._url = project.url("EMBEDDING_PORT", "/embed")
        self._texts = texts
        self._over = threading.Event()
        self._callers = [threading.Thread(target=self._call) for _ in range(callers)]

    def __enter__(self) -> Self:
        for caller in self._callers:
            caller.start()
        eventually(lambda: self.replies[200] > 20, "load is on")
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for caller in self._callers:
            caller.join()

    def _call(self) -> None:
        with httpx.Client(timeout=60, trust_env=False) as client:
            while not self._over.is_set():
                began = time.monotonic()
                try:
                    reply = client.post(self._url, json={"texts": [fresh_text() for _ in range(self._texts)]})
                    self.replies[reply.status_code] += 1
                except httpx.HTTPError as problem:
                    self.replies[repr(problem)] += 1
                self.slowest_s = max(self.slowest_s, time.monotonic() - began)

    def goes_on(self, requests: int = 20) -> None:
        """Returns when so many more have been answered."""
        enough = self.replies[200] + requests
        eventually(lambda: self.replies[200] >= enough, f"{requests} more requests are answered")

    def assert_none_failed(self) -> None:
        print(f"{self.replies[200]} requests, slowest {self.slowest_s:.1f} s")  # noqa: T201 - shown with `pytest -s`
        assert set(self.replies) == {200}


def listens(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(3)
        return probe.connect_ex((address, port)) == 0
