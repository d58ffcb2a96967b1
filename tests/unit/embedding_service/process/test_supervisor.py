"""A gateway of several real processes without a replica: what they count, how they are started and ended."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from embedding_service.process.supervisor import Supervisor, WorkerInheritance

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WITHIN_S = 40


def until(holds: Callable[[], Any], what: str) -> Any:
    give_up_at = time.monotonic() + WITHIN_S
    while time.monotonic() < give_up_at:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if result := holds():
                return result
        time.sleep(0.05)
    raise AssertionError(f"not within {WITHIN_S} s: {what}")


def running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


class Gateway:
    """Two workers; no replica is up, so that every text fails, which is counted too."""

    def __init__(self, port: int) -> None:
        self.port = port
        settings = {
            "HOST": "127.0.0.1", "PORT": str(port), "EMBEDDING_WORKERS": "2", "REDIS_ENABLED": "false",
            "ML_BASE_URL": "http://127.0.0.1:1", "DRAIN_S": "0.2",
        }  # fmt: skip
        command = [sys.executable, "-m", "embedding_service"]
        self.log_file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the gateway
        self.process = subprocess.Popen(command, env=os.environ | settings, stderr=self.log_file)

    def call(self, method: str, path: str, body: str | None = None) -> tuple[int, Any]:
        """On a connection of its own, which the kernel gives to either worker."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request(method, path, body)
            reply = connection.getresponse()
            return reply.status, json.loads(reply.read())
        finally:
            connection.close()

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def log(self) -> bytes:
        return os.pread(self.log_file.fileno(), 1 << 20, 0)

    def failed_texts(self) -> int:
        return int(self.call("GET", "/cache/stats")[1]["total"]["failed"])

    def fail(self, requests: int) -> None:
        for _ in range(requests):
            assert self.call("POST", "/embed", '{"texts": ["a"]}')[0] == 503


@pytest.fixture
def gateway(unused_port: int) -> Iterator[Gateway]:
    gateway = Gateway(unused_port)
    try:
        until(lambda: len(gateway.workers()) == 2 and gateway.call("GET", "/livez"), "two workers")
        yield gateway
    finally:
        for pid in (*gateway.workers(), gateway.process.pid) if running(gateway.process.pid) else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        gateway.process.wait()
        gateway.log_file.close()


def test_either_worker_speaks_for_both_and_a_dead_ones_counts_are_kept(gateway: Gateway) -> None:
    gateway.fail(20)
    assert {gateway.failed_texts() for _ in range(10)} == {20}
    dead = gateway.workers()[0]
    os.kill(dead, signal.SIGKILL)
    until(lambda: len(gateway.workers()) == 2 and dead not in gateway.workers(), "a successor")
    until(lambda: gateway.failed_texts() == 20, "the counts of the dead worker")
    gateway.fail(5)
    assert {gateway.failed_texts() for _ in range(10)} == {25}


def test_what_a_worker_held_goes_with_it_though_it_was_killed(gateway: Gateway) -> None:
    def most() -> int:
        return int(gateway.call("GET", "/cache/stats")[1]["l1"]["max_size"])

    until(lambda: most() == 100_000, "both workers have said what they hold")
    os.kill(gateway.workers()[0], signal.SIGKILL)
    until(lambda: most() == 50_000, "what the dead one held is off the board")
    until(lambda: most() == 100_000, "its successor has said so too")


def test_sigterm_drains_all_workers_and_exits_with_0(gateway: Gateway) -> None:
    workers = gateway.workers()
    gateway.process.terminate()
    assert gateway.process.wait(WITHIN_S) == 0
    assert not any(running(pid) for pid in workers)


def test_workers_end_when_their_parent_is_killed(gateway: Gateway) -> None:
    workers = gateway.workers()
    gateway.process.kill()
    until(lambda: not any(running(pid) for pid in workers), "the workers are gone")


def test_a_successor_that_knows_no_model_is_ended_and_the_old_workers_stay(gateway: Gateway) -> None:
    workers = gateway.workers()
    gateway.process.send_signal(signal.SIGHUP)
    until(lambda: len(gateway.workers()) == 3, "a successor beside them")
    until(lambda: gateway.workers() == workers, "they are alone again")
    until(lambda: b"is not replaced: its successor serves, but knows no model" in gateway.log(), "a word of why")
    assert gateway.call("GET", "/livez")[0] == 200


def test_while_no_process_can_be_started_the_workers_that_are_there_serve_on(gateway: Gateway) -> None:
    parent, (first, second) = gateway.process, gateway.workers()
    limits = resource.prlimit(parent.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(parent.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    parent.send_signal(signal.SIGHUP)
    os.kill(first, signal.SIGKILL)
    time.sleep(2)  # the pause before a worker is started again, and one more
    assert gateway.workers() == [second]
    assert gateway.call("GET", "/livez")[0] == 200
    resource.prlimit(parent.pid, resource.RLIMIT_NOFILE, limits)
    until(lambda: len(gateway.workers()) == 2, "a successor")


async def test_a_first_worker_that_cannot_start_ends_the_gateway(unused_port: int) -> None:
    with socket.create_server(("127.0.0.1", unused_port)) as listener:
        no_board = listener.fileno()
        ended: list[int] = []
        supervisor = Supervisor(
            listener=listener, scoreboard_fd=no_board, workers=1, stop_within_s=1, on_worker_end=ended.append
        )
        assert await supervisor.run() == 1
        assert ended == [0]


def test_a_port_in_use_is_one_line(gateway: Gateway) -> None:
    settings = {"HOST": "127.0.0.1", "PORT": str(gateway.port)}
    command = [sys.executable, "-m", "embedding_service"]
    second = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=WITHIN_S, check=False)
    assert second.returncode == 1
    told = f"embedding-service: cannot listen on 127.0.0.1 port {gateway.port} (HOST, PORT): Address already in use\n"
    assert second.stderr == told


def test_an_inheritance_survives_the_command_line() -> None:
    inherited = WorkerInheritance(row=1, rows=4, listen_fd=5, scoreboard_fd=6, lifeline_fd=7, report_fd=8)
    assert WorkerInheritance.from_argument(inherited.to_argument()) == inherited
