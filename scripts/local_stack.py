#!/usr/bin/env python3
"""The whole service on this machine: Redis, HAProxy, ML-Base replicas and the gateway, each a real process on loopback.

As a program it starts them, tells what is up, prints their logs and ends them on Ctrl-C. As a library (`LocalStack`) it
gives tests the same stack with parts that can be killed, frozen and started again.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import http.client
import os
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Self

from local_console import Console, tell, welcome
from local_machine import LOOPBACK, free_row_of_ports, haproxy_command, listener, only_copy, port_is_free, redis_command
from local_part import Part, StackError, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import FrameType

ROOT = Path(__file__).resolve().parent.parent
PROBE_TIMEOUT_S = 1.0
WARM_WITHIN_S = 180.0
"""Three replicas load their model in about 15 s on two idle cores; a cold disk or a busy machine takes far longer."""
WORD_EVERY_S = 5.0
STOP_WITHIN_S = 8.0
REPLICA_DRAIN_S = 3.0
LAST_PORT = 65535
USE_SERVER = "    use-server %[req.hdr(x-replica)] if { req.hdr(x-replica) -m found }"
"""What belongs into every list of servers: see "naming" in haproxy/haproxy.cfg."""


@dataclass(frozen=True)
class Ports:
    """Where the parts listen. Each is set by the variable that the part itself reads."""

    gateway: int = 8888
    ml: int = 8887
    stats: int = 9999
    redis: int = 16379  # not 6379: a Redis of the machine's own is none of our business
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
    """The parts, and what is true of them together. A context manager: whatever happens, leaving it ends them all.

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
        """ML-Base through HAProxy, uncached."""
        return f"http://{LOOPBACK}:{self.ports.ml}"

    @property
    def stats_url(self) -> str:
        return f"http://{LOOPBACK}:{self.ports.stats}"

    def start(self) -> None:
        """All parts at once: each does without the others until they are there. Raises `StackError`."""
        self._check_ports()
        for folder in (self.log_dir, self._redis_dir):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        self._servers_cfg.write_text(servers_cfg(self._replica_ports()))
        for part in self.parts:
            part.start()

    def pending(self) -> list[str]:
        """Names of what is not ready yet; asks, never waits. Raises `StackError` for a part that cannot start."""
        waiting = [part.name for part in self.parts if not part.ready()]
        return waiting or [f"{name} in HAProxy" for name, state in self.servers().items() if state != "UP"]

    def wait_ready(self, timeout_s: float = WARM_WITHIN_S) -> None:
        """Until every part answers and HAProxy sends work to every replica."""
        wait_until(lambda: not self.pending(), "every part is ready", timeout_s=timeout_s)

    def servers(self) -> dict[str, str]:
        """What HAProxy thinks of each replica: "UP", "DOWN", "UP 1/3" while its checks change their mind."""
        rows = self._statistics()
        return {part.name: rows[part.name]["status"] if rows else "unknown" for part in self.replicas}

    def given(self) -> dict[str, int]:
        """How many requests HAProxy has given to each replica."""
        return {name: int(row["stot"]) for name, row in self._statistics().items()}

    def _statistics(self) -> dict[str, dict[str, str]]:
        """HAProxy's row of each replica; none where it does not answer."""
        status, body = http_get(self.ports.stats, "/stats;csv")
        if status != http.HTTPStatus.OK:
            return {}
        names = {part.name for part in self.replicas}
        rows = csv.DictReader(body.decode().removeprefix("# ").splitlines())
        return {row["svname"]: row for row in rows if row["svname"] in names}

    def stop(self) -> None:
        """First those who ask, then those who answer, so that nobody is cut off; the replicas drain together."""
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
        """`start` empties two folders: never those of somebody else, in a folder that no stack has used before."""
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
            "--save": "",  # a cache of vectors that can be computed again: nothing is kept over a restart here
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
        # no balancer stands in front of it here that would have to notice first
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
        "PYTHONSAFEPATH": "1",  # `-m` would otherwise import whatever lies in the caller's folder
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }


def _seconds(text: str) -> float:
    """As the gateway takes them; 0 for what it refuses by name."""
    try:
        return max(0.0, min(300.0, float(text)))
    except ValueError:
        return 0.0


def servers_cfg(replica_ports: Sequence[int]) -> str:
    """The local list of servers; every rule about them is in haproxy/haproxy.cfg."""
    lines = [f"    server ml-base-{number} {LOOPBACK}:{port}" for number, port in enumerate(replica_ports, 1)]
    return "\n".join(("backend ml-base from ml_base", USE_SERVER, *lines, ""))


def http_get(port: int, path: str) -> tuple[int, bytes]:
    """Status and body; status 0 where nobody answers in time."""
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
    """Ready, or locked: with OPERATOR_PATHS_OPEN=false it tells nobody without a key whether it is."""
    return http_get(port, "/readyz")[0] in {http.HTTPStatus.OK, http.HTTPStatus.UNAUTHORIZED}


def redis_answers(port: int) -> bool:
    try:
        with socket.create_connection((LOOPBACK, port), timeout=PROBE_TIMEOUT_S) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(7) == b"+PONG\r\n"
    except OSError:
        return False


class StopRequest:
    """Set by the first SIGINT, SIGTERM, or SIGHUP, unless `nohup` has that ignored.

    A plain flag: a handler that raises could leave a part unowned.
    """

    def __init__(self) -> None:
        self.came = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.came = True


def serve(stack: LocalStack, stop: StopRequest) -> None:
    """Starts everything, tells what is up, prints logs until told to stop."""
    stack.start()
    console = Console(stack.parts)
    warm_up(stack, stop, console)
    console.skip()
    if not stop.came:
        tell(welcome(url=stack.url, ml_url=stack.ml_url, stats_url=stack.stats_url, logs=stack.log_dir))
    while not stop.came:
        console.follow()
        time.sleep(0.2)
    tell("\nending gateway, HAProxy, replicas and Redis ...")


def warm_up(stack: LocalStack, stop: StopRequest, console: Console) -> None:
    """Until all is ready, or `stop`; tells each part that came up, and every few seconds what is awaited."""
    began, untold = time.monotonic(), stack.parts
    next_word_s = WORD_EVERY_S
    while not stop.came:
        waiting = stack.pending()
        for part in [part for part in untold if part.ready_after_s is not None]:
            untold.remove(part)
            console.say(part.name, f"ready after {part.ready_after_s:.1f} s")
        if not waiting:
            return
        elapsed_s = time.monotonic() - began
        if elapsed_s > WARM_WITHIN_S:
            raise StackError(f"{', '.join(waiting)}: not ready after {WARM_WITHIN_S:g} s; see {stack.log_dir}")
        if elapsed_s > next_word_s:
            console.say("", f"{elapsed_s:.0f} s: waiting for {', '.join(waiting)}")
            next_word_s += WORD_EVERY_S
        time.sleep(0.1)


def port_number(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= LAST_PORT:
        raise argparse.ArgumentTypeError(f"must be a port, 1 to {LAST_PORT}, got {text!r}")
    return int(text)


def parse_args(argv: Sequence[str], environ: Mapping[str, str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/up",
        description="Runs Redis, HAProxy, the ML-Base replicas and the gateway on loopback until Ctrl-C.",
        epilog="Every variable of the gateway and of ML-Base (README) is passed on to them, but for those that say "
        "where parts listen and find each other.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for field in fields(Ports):
        variable = PORT_VARIABLES[field.name]
        parser.add_argument(
            f"--{field.name.replace('_', '-')}-port",
            *(["--port"] if field.name == "gateway" else []),
            type=port_number,
            metavar="PORT",
            # argparse runs a default that is a string through `type`, so a wrong variable is told like a wrong flag
            default=environ.get(variable) or str(field.default),  # empty: not set, as for the parts themselves
            help=f"or {variable}",
        )
    parser.add_argument("--replicas", type=int, metavar="N", default=environ.get("REPLICAS") or "3", help="or REPLICAS")
    parser.add_argument(
        "--state-dir",
        type=Path,
        metavar="DIR",
        default=environ.get("STATE_DIR") or str(ROOT / ".local"),
        help="logs, lock, list of servers; or STATE_DIR",
    )
    args = parser.parse_args(argv)
    if args.replicas < 1:
        parser.error(f"--replicas must be at least 1, got {args.replicas}")
    if (last := args.first_replica_port + args.replicas - 1) > LAST_PORT:
        parser.error(f"--first-replica-port: the last of {args.replicas} replicas would get {last}, above {LAST_PORT}")
    return args


def main() -> int:
    args = parse_args(sys.argv[1:], os.environ)
    stop = StopRequest()
    ports = Ports(**{field.name: getattr(args, f"{field.name}_port") for field in fields(Ports)})
    try:
        with LocalStack(state_dir=args.state_dir, ports=ports, replicas=args.replicas, report=tell) as stack:
            serve(stack, stop)
    except StackError as problem:
        print(f"scripts/up: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
