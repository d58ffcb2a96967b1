"""What hot_path.py measures with: pinned child processes, the gateway as a client sees it, wrk, and figures."""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import json
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import orjson
from hot_path_load import LOOPBACK, MAX_TEXTS_IN_CALL, BenchError, body, first_line, path_of, redis_command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

ROOT = Path(__file__).resolve().parents[2]
LOAD = Path(__file__).with_name("hot_path_load.py")
DIE_WITH_PARENT = ROOT / "scripts" / "local_stack" / "die_with_parent.py"
START_S = 30.0
STOP_S = 10.0
TIER_SHARE = 0.98  # of a run's texts from the tier it is about: two callers may ask L2 for one text at once
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL")  # no setting of the gateway leaks in from the caller's shell


@dataclass(frozen=True, slots=True)
class Measured:
    """One run, or the medians of several. `cpu_ms` is the server's CPU time per request, `busy` its share of a core."""

    rate: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    busy: float

    @classmethod
    def median(cls, runs: Sequence[Measured]) -> Measured:
        return cls(*(statistics.median(getattr(run, field.name) for run in runs) for field in fields(cls)))


class Child:
    """A process pinned to a core. As a context manager it is ready on entry, and ended by its pid on exit."""

    def __init__(
        self, name: str, command: Sequence[str], *, core: int, log: Path, port: int = 0, env: Mapping[str, str] = {}
    ) -> None:
        self.name = name
        self.port = port
        self._command = [sys.executable, "-I", "-S", str(DIE_WITH_PARENT), str(os.getpid()), *command]
        self._core = core
        self._log = log
        self._env = {key: os.environ[key] for key in KEPT_VARIABLES if key in os.environ} | dict(env)

    def start(self, stdout: int) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            return subprocess.Popen(
                self._command,
                cwd=ROOT,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=log,
                preexec_fn=lambda: os.sched_setaffinity(0, {self._core}),  # noqa: PLW1509 - no threads in this process
            )

    def __enter__(self) -> Self:
        self._process = self.start(subprocess.DEVNULL)
        give_up_at = time.monotonic() + START_S
        while not self.is_ready():
            if self._process.poll() is not None or time.monotonic() > give_up_at:
                self.__exit__()
                raise BenchError(f"{self.name} did not start: {self.last_line()}")
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def is_ready(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection((LOOPBACK, self.port), 1):
            return True
        return False

    def output(self) -> bytes:
        """Runs it to its end. Raises `BenchError` with its last line if that is not a good one."""
        with self.start(subprocess.PIPE) as process:
            printed, _ = process.communicate()
        if process.returncode:
            raise BenchError(f"{self.name} ended with exit code {process.returncode}: {self.last_line()}")
        return printed

    def last_line(self) -> str:
        lines = self._log.read_text(errors="replace").split("\n") if self._log.exists() else []
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")

    def cpu_s(self) -> float:
        """User and system time so far, of its own children too."""
        return sum(_cpu_ticks(pid) for pid in _family(self._process.pid)) / TICKS_PER_S

    def rss_bytes(self) -> int:
        pages = (int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in _family(self._process.pid))
        return sum(pages) * os.sysconf("SC_PAGE_SIZE")


def _family(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(descendant for child in children for descendant in _family(int(child)))]


def _cpu_ticks(pid: int) -> int:
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(after_name[11]) + int(after_name[12])  # utime, stime: fields 14 and 15 of proc(5)


class Gateway(Child):
    """The program under test, and one connection to ask it over."""

    def is_ready(self) -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.ask("GET", "/readyz")[0] == http.client.OK
        return False

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        answer, raw = self._exchange(method, path, body)
        return answer.status, raw

    def _exchange(self, method: str, path: str, body: bytes | None) -> tuple[http.client.HTTPResponse, bytes]:
        connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, {"content-type": "application/json"})
            answer = connection.getresponse()
            return answer, answer.read()

    def embed(self, body: bytes) -> dict[str, Any]:
        """A reply with status 200 and as many embeddings as texts. Raises `BenchError` for any other."""
        request = orjson.loads(body)
        status, raw = self.ask("POST", "/embed", body)
        if status != http.client.OK:
            raise BenchError(f"the gateway answered {status}: {raw[:200]!r}")
        reply: dict[str, Any] = orjson.loads(raw)
        wanted = str if request.get("encoding_format") == "base64" else list
        embeddings = reply["embeddings"]
        if len(embeddings) != len(request["texts"]) or not all(isinstance(one, wanted) for one in embeddings):
            raise BenchError(f"{len(request['texts'])} texts brought {len(embeddings)} {type(embeddings[0]).__name__}s")
        return reply

    def fill(self, count: int, *, first: int = 0) -> int:
        """Asks for `count` texts; how many of them were cached."""
        end = first + count
        starts = range(first, end, MAX_TEXTS_IN_CALL)
        return sum(
            self.embed(body(range(start, min(end, start + MAX_TEXTS_IN_CALL))))["cached_count"] for start in starts
        )

    def stats(self) -> dict[str, dict[str, Any]]:
        figures: dict[str, dict[str, Any]] = orjson.loads(self.ask("GET", "/cache/stats")[1])
        return figures

    def must_hold(self, bodies: Path) -> None:
        """The first request of a scenario is answered right, and without computing anything."""
        line = first_line(bodies)
        answer, raw = self._exchange("POST", path_of(line), line)
        if answer.status != http.client.OK or not (answer.getheader("x-cache") or "").endswith(";miss=0"):
            raise BenchError(f"the gateway answered {answer.status}, {answer.getheader('x-cache')}: {raw[:200]!r}")

    def answering(self, tier: str, run: Callable[[], Measured]) -> Measured:
        """Runs, and holds the gateway's own count against what the scenario is about."""
        tiers = {"l1": ("l1", "hits"), "l2": ("l2", "hits"), "misses": ("total", "misses")}
        before, measured, after = self.stats(), run(), self.stats()
        of_tier, texts = (
            after[group][name] - before[group][name] for group, name in (tiers[tier], ("total", "requests"))
        )
        if of_tier / texts < TIER_SHARE:
            raise BenchError(f"only {of_tier} of {texts} texts were {tier}")
        return measured


@dataclass(frozen=True, slots=True)
class Lab:
    """Where and how long everything runs."""

    folder: Path
    server_core: int
    load_core: int
    seconds: int
    repeats: int
    churn: int

    def child(self, role: str, *arguments: object, core: int, port: int = 0) -> Child:
        """A role of hot_path_load.py; `port` is where it listens, its first argument."""
        given = [*([port] if port else []), *arguments]
        command = [sys.executable, str(LOAD), role, *map(str, given)]
        return Child(role, command, core=core, port=port, log=self.folder / f"{role}.log")

    def stub(self) -> Child:
        return self.child("stub", core=self.load_core, port=free_port())

    def bare(self, gateway: Gateway, bodies: Path) -> Child:
        return self.child("bare", gateway.port, bodies, core=self.server_core, port=free_port())

    def gateway(self, stub: Child, **settings: object) -> Gateway:
        port = free_port()
        env = {"HOST": LOOPBACK, "PORT": port, "ML_BASE_URL": f"http://{LOOPBACK}:{stub.port}", "REDIS_ENABLED": False}
        env |= {"EMBEDDING_WORKERS": 1, "DRAIN_S": 0, "LOG_LEVEL": "WARNING"} | settings
        command = [sys.executable, "-m", "embedding_service"]
        texts = {name: str(value) for name, value in env.items()}
        return Gateway("gateway", command, core=self.server_core, port=port, log=self.folder / "gateway.log", env=texts)

    def redis(self) -> Child:
        port = free_port()
        command = [redis_command(), "--port", str(port), "--bind", LOOPBACK, "--save", "", "--appendonly", "no"]
        command += ["--dir", str(self.folder)]
        return Child("redis", command, core=self.load_core, port=port, log=self.folder / "redis.log")

    def alternate(self, *runs: Callable[[], Measured]) -> Iterator[tuple[Measured, ...]]:
        """Each run once, `repeats` times over: what disturbs the machine for a while disturbs all of them."""
        for _ in range(self.repeats):
            yield tuple(run() for run in runs)

    def wrk(self, server: Child, connections: int, *arguments: object, script: str) -> Measured:
        """Loads `server` for `seconds`. Raises `BenchError` if a single request failed."""
        cpu_before_s = server.cpu_s()
        printed = self.wrk_child(server, connections, self.seconds, *arguments, script=script).output()
        return wrk_figures(printed, server, server.cpu_s() - cpu_before_s)

    def wrk_child(self, server: Child, connections: int, seconds: int, *arguments: object, script: str) -> Child:
        lua = self.folder / "load.lua"
        lua.write_text(script)
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "-s", str(lua)]
        command += ["--latency", f"http://{LOOPBACK}:{server.port}/embed", "--", *map(str, arguments)]
        return Child("wrk", command, core=self.load_core, log=self.folder / "wrk.log")

    def own_figures(self, role: str, *arguments: object, core: int) -> Measured:
        """The output of a role that ends by itself and prints what it measured."""
        return Measured(**json.loads(self.child(role, *arguments, core=core).output()))


def wrk_figures(printed: bytes, server: Child, cpu_s: float = 0.0) -> Measured:
    """What `LUA_DONE` printed. Raises `BenchError` if a single request failed."""
    lines = [line.removeprefix(b"RESULT ") for line in printed.splitlines() if line.startswith(b"RESULT ")]
    if not lines:
        raise BenchError(f"{server.name}: wrk ended without a result")
    result = json.loads(lines[0])
    wall_s, requests = result["duration_us"] / 1e6, result["requests"]
    if result["failed"] or not requests:
        raise BenchError(f"{server.name}: {result['failed']} requests failed of {requests}")
    return Measured(
        requests / wall_s, result["p50_us"] / 1e3, result["p99_us"] / 1e3, cpu_s * 1e3 / requests, cpu_s / wall_s
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def surroundings() -> dict[str, str]:
    """The date, the machine and the versions that figures belong to."""
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": f"{cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores",
        "load before": f"{os.getloadavg()[0]:.2f}",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("uvicorn", "uvloop", "httptools", "redis", "hiredis")},
        "Redis server": _first_words(redis_command(), "--version").split(" sha=")[0],
        "wrk": _first_words("wrk", "-v").removeprefix("wrk ").split(" [")[0],
    }


def _first_words(*command: str) -> str:
    """The first line that a program prints, whatever its exit code: wrk's is 1 for `-v`."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.partition("\n")[0]
    except FileNotFoundError:
        raise BenchError(f"no {command[0]}: install Debian's package of that name") from None
