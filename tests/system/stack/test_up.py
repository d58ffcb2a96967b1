"""scripts/local_stack as a person runs it: what it prints, and that it leaves nothing behind."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
import pytest
from local_stack.machine import port_is_free
from local_stack.part import wait_until
from local_stack.stack import PORT_VARIABLES, Ports

from tests.system.stack.client import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]


class Terminal:
    """One run of the script; its output line by line."""

    def __init__(self, tmp_path: Path, **env: str) -> None:
        self.ports = Ports.free()
        ports = {variable: str(getattr(self.ports, name)) for name, variable in PORT_VARIABLES.items()}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "scripts" / "local_stack"), "--state-dir", str(tmp_path / "state")],
            cwd=tmp_path,
            env={**os.environ, **ports, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.printed: list[str] = []
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def read_until(self, pattern: str, *, timeout_s: float = 200) -> str:
        """The first line that matches; all before it go to `printed`."""
        deadline = time.monotonic() + timeout_s
        while (line := self._lines.get(timeout=deadline - time.monotonic())) is not None:
            self.printed.append(line)
            if re.search(pattern, line):
                return line
        raise AssertionError(f"it ended without printing {pattern!r}: {self.printed}")

    def wait_exit(self, timeout_s: float = 40) -> int:
        code = self.process.wait(timeout_s)
        self._reader.join()
        while (line := self._lines.get()) is not None:
            self.printed.append(line)
        return code

    def children(self) -> list[int]:
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(pid) for task in tasks for pid in task.read_text().split()]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def terminal(tmp_path: Path, **env: str) -> Iterator[Terminal]:
    run = Terminal(tmp_path, **env)
    try:
        yield run
    finally:
        run.close()


def is_gone(pid: int) -> bool:
    """Ended, or a zombie that waits for whoever adopted it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_it_tells_what_is_up_gives_a_curl_that_works_and_ctrl_c_ends_everything(tmp_path: Path) -> None:
    with terminal(tmp_path) as up:
        curl = up.read_until("Try: ").partition("Try: ")[2]
        for part in ("redis", "haproxy", "ml-base-1", "ml-base-2", "ml-base-3", "gateway"):
            assert any(re.match(rf"{part} +ready after \d+\.\d s", line) for line in up.printed), part

        reply = subprocess.run(curl, shell=True, capture_output=True, check=True).stdout
        assert len(orjson.loads(reply)["embeddings"][0]) == 384
        up.read_until(r"^(gateway|ml-base-\d) .*texts", timeout_s=10)

        children = up.children()
        assert len(children) == 6
        began = time.monotonic()
        up.process.send_signal(signal.SIGINT)
        assert up.wait_exit() == 0
        assert time.monotonic() - began < 20
        assert all(map(is_gone, children))
        assert not [line for line in up.printed if "Traceback" in line or "started again" in line]
        assert all(map(port_is_free, range(up.ports.gateway, up.ports.first_replica + 3)))


def test_a_kill_9_of_the_script_ends_its_children_too(tmp_path: Path) -> None:
    with terminal(tmp_path) as up:
        up.read_until("haproxy +ready")
        wait_until(lambda: len(up.children()) == 6, "all parts run", timeout_s=20)
        children = up.children()
        up.process.kill()
        wait_until(lambda: all(map(is_gone, children)), "all children are gone", timeout_s=20)


def test_sigterm_while_it_warms_ends_everything(tmp_path: Path) -> None:
    with terminal(tmp_path) as up:
        up.read_until("redis +ready")
        children = up.children()
        up.process.send_signal(signal.SIGTERM)
        assert up.wait_exit() == 0
        assert all(map(is_gone, children))


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    with terminal(tmp_path, ML_BASE_MODELS=str(tmp_path / "none-such")) as up:
        assert up.wait_exit(timeout_s=100) == 1
        last = up.printed[-1]
        assert re.match(r"scripts/up: ml-base-\d ended with exit code 1 before it was ready: .*none-such", last)
        assert not [line for line in up.printed if "Traceback" in line]
