"""The machinery of the local stack, with tiny child processes: no model, no Redis, no HAProxy."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from local_stack.__main__ import parse_args
from local_stack.console import LOG_LIMIT_BYTES, Console
from local_stack.machine import FREE_PORTS, free_row_of_ports, haproxy_version, only_copy, port_is_free
from local_stack.part import Part, StackError, wait_until
from local_stack.stack import USE_SERVER, LocalStack, Ports, gateway_answers, http_get, redis_answers, servers_cfg

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "scripts" / "local_stack"

FOREVER = "import threading; print('here', flush=True); threading.Event().wait()"
DEAF = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + FOREVER
POLITE = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); " + FOREVER


@contextmanager
def running(tmp_path: Path, code: str, *, stop_within_s: float = 5) -> Iterator[tuple[Part, list[str]]]:
    """A part that is ready once it has printed "here", and what it reported."""
    reports: list[str] = []
    log_path = tmp_path / "part.log"
    part = Part(
        "part",
        [sys.executable, "-c", code],
        env=os.environ,
        log_path=log_path,
        probe=lambda: "here" in log_path.read_text(),
        stop_within_s=stop_within_s,
        report=reports.append,
    )
    part.start()
    try:
        yield part, reports
    finally:
        part.stop(signal.SIGKILL)


def alive(pid: int) -> bool:
    """Returns whether the process runs. A zombie does not: it only waits for its parent."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False


def soon(condition: Callable[[], bool], what: str) -> None:
    wait_until(condition, what, timeout_s=20, every_s=0.02)


def test_a_part_that_dies_is_started_again_and_says_so(tmp_path: Path) -> None:
    with running(tmp_path, FOREVER) as (part, reports):
        part.wait_ready()
        first = part.pid
        part.send(signal.SIGKILL)
        soon(lambda: part.pid not in {None, first}, "it runs again")
        assert reports == ["part ended with SIGKILL; it is started again in 0.5 s"]
        assert part.restarted_at is not None


def test_a_part_that_was_stopped_stays_down_until_it_is_started(tmp_path: Path) -> None:
    with running(tmp_path, POLITE) as (part, reports):
        part.wait_ready()
        assert part.stop() == 0
        assert part.pid is None
        assert not part.ready()
        part.start()
        part.wait_ready()
        assert reports == []


def test_a_part_deaf_to_sigterm_is_killed_when_its_time_is_up(tmp_path: Path) -> None:
    with running(tmp_path, DEAF, stop_within_s=0.2) as (part, reports):
        part.wait_ready()
        assert part.stop() == -signal.SIGKILL
        assert reports == ["part has not ended within 0.2 s: killed"]


def test_a_frozen_part_still_ends_cleanly(tmp_path: Path) -> None:
    with running(tmp_path, POLITE) as (part, _):
        part.wait_ready()
        part.send(signal.SIGSTOP)
        assert part.stop() == 0


def test_a_part_that_dies_before_it_is_ready_tells_its_last_line(tmp_path: Path) -> None:
    with (
        running(tmp_path, "print('no such model: x', flush=True); raise SystemExit(3)") as (part, _),
        pytest.raises(StackError, match="part ended with exit code 3 before it was ready: no such model: x"),
    ):
        part.wait_ready()


def test_workers_that_a_killed_part_leaves_behind_are_ended(tmp_path: Path) -> None:
    code = (
        f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {DEAF!r}]).pid, flush=True);" + FOREVER
    )
    with running(tmp_path, code) as (part, _):
        soon(lambda: part.log_text().count("here") == 2, "both run")
        worker_pid = int(part.log_text().split()[0])
        part.send(signal.SIGKILL)
        soon(lambda: not alive(worker_pid), "the worker is gone")


def test_children_end_when_their_supervisor_is_killed(tmp_path: Path) -> None:
    supervisor = textwrap.dedent(f"""
        import sys, threading, os
        from pathlib import Path
        from local_stack.part import Part
        log_path = Path({str(tmp_path / "log")!r})
        part = Part("part", [sys.executable, "-c", {FOREVER!r}], env=os.environ, log_path=log_path,
                    probe=lambda: True, stop_within_s=1, report=print)
        part.start()
        while part.pid is None or "here" not in part.log_text(): threading.Event().wait(0.02)
        print(part.pid, flush=True)
        threading.Event().wait()
    """)
    with subprocess.Popen(
        [sys.executable, "-c", supervisor], cwd=SCRIPT.parent, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child_pid = int(parent.stdout.readline())
        assert alive(child_pid)
        parent.kill()
    soon(lambda: not alive(child_pid), "the child is gone")


def test_free_ports_are_neighbours_that_no_outgoing_connection_takes() -> None:
    first = free_row_of_ports(7)
    assert all(port_is_free(port) for port in range(first, first + 7))
    assert first in FREE_PORTS


def test_a_second_copy_is_told_the_pid_of_the_first(tmp_path: Path) -> None:
    with (
        only_copy(tmp_path),
        pytest.raises(StackError, match=f"already running with pid {os.getpid()} in {re.escape(str(tmp_path))}"),
        only_copy(tmp_path),
    ):
        pass


def test_the_lock_of_a_dead_copy_blocks_no_start(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("99999\n")
    with only_copy(tmp_path):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def run_script(*arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **env},
    )


@pytest.mark.parametrize("variable", ["PORT", "ML_PORT", "STATS_PORT", "REDIS_PORT", "ML_BASE_PORT"])
def test_a_port_in_use_is_one_line_that_names_the_port_its_holder_and_the_variable(
    tmp_path: Path, variable: str
) -> None:
    first = free_row_of_ports(7)
    free = dict(
        zip(("PORT", "ML_PORT", "STATS_PORT", "REDIS_PORT", "ML_BASE_PORT"), range(first, first + 5), strict=True)
    )
    with socket.create_server(("127.0.0.1", free[variable])):
        run = run_script("--state-dir", tmp_path, **{name: str(port) for name, port in free.items()})
    assert run.returncode == 1
    assert run.stdout == ""
    holder = rf"by \S+ \(pid {os.getpid()}\)"
    assert re.fullmatch(
        rf"scripts/up: port {free[variable]} is in use {holder}: choose another with {variable}\n", run.stderr
    )


def test_a_second_run_of_the_script_is_one_line(tmp_path: Path) -> None:
    with only_copy(tmp_path):
        run = run_script("--state-dir", tmp_path)
    assert run.returncode == 1
    assert run.stderr.startswith(f"scripts/up: a copy is already running with pid {os.getpid()}")
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["logs", "redis"])
def test_folders_that_no_stack_made_are_not_emptied(tmp_path: Path, name: str) -> None:
    theirs = tmp_path / name / "theirs"
    theirs.parent.mkdir()
    theirs.write_text("precious")
    run = run_script("--state-dir", tmp_path)
    assert run.stderr == f"scripts/up: {theirs.parent} is not of this script: choose another --state-dir\n"
    assert theirs.read_text() == "precious"


def test_a_state_folder_that_cannot_be_is_one_line() -> None:
    run = run_script("--state-dir", "/dev/null/state")
    assert (run.returncode, run.stderr.count("\n")) == (1, 1)
    assert run.stderr.startswith("scripts/up: /dev/null/state: ")


def test_an_empty_state_dir_variable_is_none() -> None:
    assert parse_args([], {"STATE_DIR": ""}).state_dir == ROOT / ".local"


@pytest.mark.parametrize(
    ("arguments", "env", "named"),
    [
        (["--replicas", "0"], {}, "--replicas must be at least 1, got 0"),
        (["--port", "x"], {}, "--port"),
        ([], {"REDIS_PORT": "x"}, "--redis-port"),
        (["--port", "70000"], {}, "--port: must be a port, 1 to 65535, got '70000'"),
        (["--ml-port", "0"], {}, "--ml-port: must be a port, 1 to 65535, got '0'"),
        (["--first-replica-port", "65534"], {}, "the last of 3 replicas would get 65536, above 65535"),
    ],
)
def test_a_wrong_option_is_told_by_name(arguments: list[str], env: dict[str, str], named: str) -> None:
    run = run_script(*arguments, **env)
    assert run.returncode == 2
    assert named in run.stderr
    assert "Traceback" not in run.stderr


def test_a_flag_wins_over_its_variable_and_a_variable_over_the_default() -> None:
    args = parse_args(["--port", "1"], {"PORT": "2", "STATS_PORT": "3"})
    assert (args.gateway_port, args.stats_port, args.redis_port) == (1, 3, Ports().redis)


def test_an_empty_variable_is_none() -> None:
    args = parse_args([], {"PORT": "", "REPLICAS": ""})
    assert (args.gateway_port, args.replicas) == (Ports().gateway, 3)


@pytest.mark.parametrize(("drain", "within_s"), [("12", 20.0), ("", 8.0), ("soon", 8.0)])
def test_a_gateway_is_given_the_time_to_drain_that_it_was_told_to_take(
    tmp_path: Path, drain: str, within_s: float
) -> None:
    gateway = LocalStack(state_dir=tmp_path, env={"DRAIN_S": drain}).gateway
    assert gateway.stop_within_s == within_s


def test_the_list_of_servers_names_them_as_the_containers_are_named() -> None:
    assert servers_cfg([18001, 18002]) == (
        f"backend ml-base from ml_base\n{USE_SERVER}\n"
        "    server ml-base-1 127.0.0.1:18001\n    server ml-base-2 127.0.0.1:18002\n"
    )


def test_containers_are_named_by_the_same_rule_as_local_replicas() -> None:
    assert USE_SERVER in (ROOT / "haproxy" / "servers-docker.cfg").read_text()


@pytest.mark.parametrize(
    ("printed", "version"),
    [("HAProxy version 2.8.25-abc 2025/01/01", (2, 8)), ("HA-Proxy version 2.6.12", (2, 6)), ("nonsense", (0,))],
)
def test_the_version_of_a_haproxy_is_read_from_what_it_prints(
    tmp_path: Path, printed: str, version: tuple[int, ...]
) -> None:
    fake = tmp_path / "haproxy"
    fake.write_text(f"#!/bin/sh\necho '{printed}'\n")
    fake.chmod(0o755)
    assert haproxy_version(str(fake)) == version


def test_probes_of_a_silent_or_absent_server_are_no_answer() -> None:
    port = free_row_of_ports(1)
    assert http_get(port, "/") == (0, b"")
    assert not redis_answers(port)


@pytest.mark.parametrize(("status", "up"), [(200, True), (401, True), (503, False)])
def test_a_gateway_that_asks_for_a_key_is_up(*, status: int, up: bool) -> None:
    def answer() -> None:
        with server.accept()[0] as connection:
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 %d x\r\ncontent-length: 0\r\n\r\n" % status)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer)
        thread.start()
        assert gateway_answers(server.getsockname()[1]) == up
        thread.join()


def test_the_console_prints_each_whole_line_once_behind_its_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(tmp_path, FOREVER) as (part, _):
        part.wait_ready()
        console = Console([part])
        console.follow()
        with part.log_path.open("a") as log:
            log.write("half a line")
        console.follow()
        with part.log_path.open("a") as log:
            log.write(", whole\n")
        console.follow()
        assert capsys.readouterr().out == "part here\npart half a line, whole\n"


def test_a_log_past_its_limit_moves_aside_and_the_part_writes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(tmp_path, FOREVER) as (part, _):
        part.wait_ready()
        with part.log_path.open("ab") as log:
            log.truncate(LOG_LIMIT_BYTES)  # sparse: the limit costs no disk
            log.write(b"\n")
        console = Console([part])
        console.follow()
        with part.log_path.open("a") as log:
            log.write("after\n")
        console.follow()
        assert capsys.readouterr().out.endswith("part after\n")
        assert part.log_path.stat().st_size == len("after\n")
        assert part.log_path.with_suffix(".log.1").stat().st_size > LOG_LIMIT_BYTES


def test_a_log_that_is_removed_or_emptied_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(tmp_path, FOREVER) as (part, _):
        part.wait_ready()
        console = Console([part])
        console.follow()
        part.log_path.write_text("new\n")
        console.follow()
        part.log_path.unlink()
        console.skip()
        console.follow()
        assert capsys.readouterr().out == "part here\npart new\n"


def test_a_part_whose_folder_of_logs_is_gone_is_started_again(tmp_path: Path) -> None:
    with running(tmp_path / "logs", FOREVER) as (part, _):
        part.wait_ready()
        first = part.pid
        part.log_path.unlink()
        part.log_path.parent.rmdir()
        part.send(signal.SIGKILL)
        soon(lambda: part.pid not in {None, first} and "here" in part.log_text(), "it runs again")


def test_a_log_that_cannot_move_aside_is_cut_all_the_same(tmp_path: Path) -> None:
    with running(tmp_path, FOREVER) as (part, _):
        part.wait_ready()
        part.log_path.with_suffix(".log.1").mkdir()
        with part.log_path.open("ab") as log:
            log.truncate(LOG_LIMIT_BYTES)
            log.write(b"\n")
        Console([part]).follow()
        assert part.log_path.stat().st_size == 0


def test_a_full_disk_under_the_output_ends_nothing() -> None:
    tell = "from local_stack.console import tell; tell('a'); tell('b'); import os; os._exit(0)"
    with Path("/dev/full").open("w") as full:
        assert subprocess.run([sys.executable, "-c", tell], cwd=SCRIPT.parent, stdout=full, check=False).returncode == 0


@pytest.mark.parametrize(("before", "came"), [("SIG_DFL", True), ("SIG_IGN", False)])
def test_a_hangup_ends_it_but_not_under_nohup(before: str, *, came: bool) -> None:
    hang_up = f"""
        import os, signal
        from local_stack.__main__ import StopRequest
        signal.signal(signal.SIGHUP, signal.{before})
        stop = StopRequest()
        os.kill(os.getpid(), signal.SIGHUP)
        print(stop.came)
    """
    command = [sys.executable, "-c", textwrap.dedent(hang_up)]
    run = subprocess.run(command, cwd=SCRIPT.parent, stdout=subprocess.PIPE, text=True, check=True)
    assert run.stdout == f"{came}\n"


def test_waiting_in_vain_names_what_was_waited_for() -> None:
    began = time.monotonic()
    with pytest.raises(StackError, match=re.escape("waited 0 s in vain until pigs fly")):
        wait_until(lambda: False, "pigs fly", timeout_s=0)
    assert time.monotonic() - began < 1
