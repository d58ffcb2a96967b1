"""The whole service on this machine: Redis, HAProxy, ML-Base replicas and the gateway, each a real process on loopback.

`LocalStack` serves scripts/up, and tests, which kill, freeze and restart its parts.
"""

from __future__ import annotations

import contextlib
import csv
import http.client
import os
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from local_stack.machine import (
    LOOPBACK,
    free_row_of_ports,
    haproxy_command,
    listener,
    only_copy,
    port_is_free,
    redis_command,
)
from local_stack.part import Part, StackError, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

ROOT = Path(__file__).resolve().parents[2]
PROBE_TIMEOUT_S = 1.0
WARM_WITHIN_S = 180.0
"""Three replicas load their model in about 15 s on two idle cores. A cold disk or a busy machine takes far longer."""
WORD_EVERY_S = 5.0
STOP_WITHIN_S = 8.0
REPLICA_DRAIN_S = 3.0
LAST_PORT = 65535
USE_SERVER = "    use-server %[req.hdr(x-replica)] if { req.hdr(x-replica) -m found }"
"""The line that each list of servers needs: see "naming" in haproxy/haproxy.cfg."""


@dataclass(frozen=True)
class Ports:
    """Where the parts listen. Each is set by the variable that the part itself reads."""

    gateway: int = 8888
    ml: int = 8887
    stats: int = 9999
    redis: int = 16379  # not 6379, where a Redis of the machine itself may listen
    first_replica: int = 18001

    @classmethod
    def free(cls, *, replicas: int = 3) -> Ports:
        first = free_row_of_ports(4 + replicas)
        return cls(first, first + 1, first + 2, first + 3, first + 4)


PORT_VARIABLES = {
    "gateway": "PORT",
    "ml": "ML_PORT",
    "stats": "STATS_PORT",
    "redis": "REDIS_PORT",
    "first_replica": "ML_BASE_PORT",
}


class LocalStack:
    """The parts, and their common state. It is a context manager: leaving it ends all parts, whatever happened.

    `with LocalStack(...) as stack` holds the lock of the state folder; `stack.start()` then starts every part at once.
    """

    def __init__(
        self,
        *,
        state_dir: Path,
        ports: Ports | None = None,
        replicas: int = 3,
        env: Mapping[str, str] | None = None,
        replica_command: Sequence[str] = (sys.executable, "-m", "ml_base"),
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.state_dir = state_dir.resolve()
        self.ports = ports or Ports.free(replicas=replicas)
        self._env = {**os.environ, **_python_env(), **(env or {})}
        self._env.pop("REDIS_PASSWORD", None)  # the Redis started here is on loopback and has none
        self._replica_command = replica_command
        self._report = report
        self._exit = contextlib.ExitStack()
        self.redis = self._redis()
        self.haproxy = self._haproxy()
        self.replicas = [self._replica(number, of=replicas) for number in range(1, replicas + 1)]
        self.gateway = self._gateway()

    def __enter__(self) -> Self:
        self._check_state_dir()
        self._exit.enter_context(only_copy(self.state_dir))
        self._exit.callback(self.stop)
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    @property
    def parts(self) -> list[Part]:
        return [self.redis, self.haproxy, *self.replicas, self.gateway]

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.ports.gateway}"

    @property
    def ml_url(self) -> str:
        """The URL of ML-Base through HAProxy, without a cache."""
        return f"http://{LOOPBACK}:{self.ports.ml}"

    @property
    def stats_url(self) -> str:
        return f"http://{LOOPBACK}:{self.ports.stats}"

    def start(self) -> None:
        """Starts all parts at once: each works without the others until they answer. Raises `StackError`."""
        self._check_ports()
        for folder in (self.log_dir, self._redis_dir):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        self._servers_cfg.write_text(servers_cfg(self._replica_ports()))
        for part in self.parts:
            part.start()

    def pending(self) -> list[str]:
        """Returns the names of what is not ready yet, without waiting. Raises `StackError` if a part cannot start."""
        waiting = [part.name for part in self.parts if not part.ready()]
        return waiting or [f"{name} in HAProxy" for name, state in self.servers().items() if state != "UP"]

    def wait_ready(self, timeout_s: float = WARM_WITHIN_S) -> None:
        """Waits until each part answers and HAProxy sends work to each replica."""
        wait_until(lambda: not self.pending(), "every part is ready", timeout_s=timeout_s)

    def servers(self) -> dict[str, str]:
        """Returns HAProxy's state of each replica: "UP", "DOWN", or such as "UP 1/3" while some checks fail."""
        rows = self._statistics()
        return {part.name: rows[part.name]["status"] if rows else "unknown" for part in self.replicas}

    def given(self) -> dict[str, int]:
        """Returns the number of requests that HAProxy has given to each replica."""
        return {name: int(row["stot"]) for name, row in self._statistics().items()}

    def _statistics(self) -> dict[str, dict[str, str]]:
        """Returns HAProxy's row of each replica, or no rows if it does not answer."""
        status, body = http_get(self.ports.stats, "/stats;csv")
        if status != http.HTTPStatus.OK:
            return {}
        names = {part.name for part in self.replicas}
        rows = csv.DictReader(body.decode().removeprefix("# ").splitlines())
        return {row["svname"]: row for row in rows if row["svname"] in names}

    def stop(self) -> None:
        """Stops each part before those that it calls, so that no request is cut off. The replicas drain together."""
        for together in ([self.gateway], [self.haproxy], self.replicas, [self.redis]):
            for part in together:
                part.ask_to_stop()
            for part in together:
                part.wait_stopped()

    @property
    def log_dir(self) -> Path:
        return self.state_dir / "logs"

    @property
    def _servers_cfg(self) -> Path:
        return self.state_dir / "servers.cfg"

    @property
    def _redis_dir(self) -> Path:
        return self.state_dir / "redis"

    def _replica_ports(self) -> list[int]:
        return [self.ports.first_replica + index for index in range(len(self.replicas))]

    def _check_state_dir(self) -> None:
        """Raises `StackError` if `start` would empty a folder that no stack has made: it empties two folders."""
        if not (self.state_dir / "lock").exists():
            for folder in (self.log_dir, self._redis_dir):
                if folder.exists():
                    raise StackError(f"{folder} is not of this script: choose another --state-dir")

    def _check_ports(self) -> None:
        singles = {name: getattr(self.ports, name) for name in PORT_VARIABLES if name != "first_replica"}
        wanted = [*singles.items(), *(("first_replica", port) for port in self._replica_ports())]
        for name, port in wanted:
            if not port_is_free(port):
                raise StackError(f"port {port} is in use{listener(port)}: choose another with {PORT_VARIABLES[name]}")

    def _part(
        self,
        name: str,
        command: Sequence[str],
        probe: Callable[[], bool],
        *,
        env: Mapping[str, str],
        drain_s: float = 0,
    ) -> Part:
        return Part(
            name,
            command,
            env={**self._env, **env},
            log_path=self.log_dir / f"{name}.log",
            probe=probe,
            stop_within_s=drain_s + STOP_WITHIN_S,
            report=self._report,
        )

    def _redis(self) -> Part:
        options = {
            "--bind": LOOPBACK,
            "--port": str(self.ports.redis),
            "--dir": str(self._redis_dir),
            "--save": "",  # vectors can be computed again, so nothing is kept over a restart here
            "--appendonly": "no",
            "--maxmemory": "500mb",
            "--maxmemory-policy": "allkeys-lru",
        }
        command = [redis_command(), *(word for option in options.items() for word in option)]
        return self._part("redis", command, lambda: redis_answers(self.ports.redis), env={})

    def _haproxy(self) -> Part:
        binary, env = haproxy_command()
        # a master that reloads its worker at SIGUSR2 and hands it the listening sockets
        command = [binary, "-W", "-db", "-f", str(ROOT / "haproxy" / "haproxy.cfg"), "-f", str(self._servers_cfg)]
        return self._part(
            "haproxy",
            command,
            lambda: http_get(self.ports.stats, "/stats;csv")[0] == http.HTTPStatus.OK,
            env={
                "ML_BIND": LOOPBACK,
                "ML_PORT": str(self.ports.ml),
                "STATS_BIND": LOOPBACK,
                "STATS_PORT": str(self.ports.stats),
                **env,
            },
        )

    def _replica(self, number: int, *, of: int) -> Part:
        port = self.ports.first_replica + number - 1
        return self._part(
            f"ml-base-{number}",
            self._replica_command,
            lambda: http_get(port, "/health")[0] == http.HTTPStatus.OK,
            drain_s=REPLICA_DRAIN_S,
            env={
                "ML_BASE_HOST": LOOPBACK,
                "ML_BASE_PORT": str(port),
                "INSTANCE_ID": f"ml-base-{number}",
                "ML_BASE_REPLICAS_PER_HOST": str(of),
                "ML_BASE_CACHE_DIR": self._env.get("ML_BASE_CACHE_DIR", str(ROOT / ".local" / "models")),
                "ML_BASE_DRAIN_S": str(REPLICA_DRAIN_S),
            },
        )

    def _gateway(self) -> Part:
        # here no balancer stands in front of the gateway, which would need time to notice that it drains
        drain = self._env.get("DRAIN_S") or "0"
        return self._part(
            "gateway",
            [sys.executable, "-m", "embedding_service"],
            lambda: gateway_answers(self.ports.gateway),
            drain_s=_seconds(drain),
            env={
                "HOST": LOOPBACK,
                "PORT": str(self.ports.gateway),
                "ML_BASE_URL": self.ml_url,
                "REDIS_HOST": LOOPBACK,
                "REDIS_PORT": str(self.ports.redis),
                "DRAIN_S": drain,
            },
        )


def _python_env() -> dict[str, str]:
    return {
        "PYTHONUNBUFFERED": "1",  # a log line is readable when it is written
        "PYTHONSAFEPATH": "1",  # otherwise `-m` could import files of the caller's folder
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }


def _seconds(text: str) -> float:
    """Returns the seconds that the gateway reads in `text`, or 0 if it refuses the value."""
    try:
        return max(0.0, min(300.0, float(text)))
    except ValueError:
        return 0.0


def servers_cfg(replica_ports: Sequence[int]) -> str:
    """Returns the local list of servers for HAProxy. All rules about them are in haproxy/haproxy.cfg."""
    lines = [f"    server ml-base-{number} {LOOPBACK}:{port}" for number, port in enumerate(replica_ports, 1)]
    return "\n".join(("backend ml-base from ml_base", USE_SERVER, *lines, ""))


def http_get(port: int, path: str) -> tuple[int, bytes]:
    """Returns status and body. The status is 0 if no answer comes in time."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=PROBE_TIMEOUT_S)
    try:
        connection.request("GET", path)
        reply = connection.getresponse()
        return reply.status, reply.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def gateway_answers(port: int) -> bool:
    """Returns whether the gateway is ready or locked: with OPERATOR_PATHS_OPEN=false only a key shows readiness."""
    return http_get(port, "/readyz")[0] in {http.HTTPStatus.OK, http.HTTPStatus.UNAUTHORIZED}


def redis_answers(port: int) -> bool:
    try:
        with socket.create_connection((LOOPBACK, port), timeout=PROBE_TIMEOUT_S) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(7) == b"+PONG\r\n"
    except OSError:
        return False
