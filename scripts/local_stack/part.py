"""One part of the local stack: a child process that is started, probed, started again when it dies, and ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

DIE_WITH_PARENT = Path(__file__).resolve().with_name("die_with_parent.py")

FIRST_RESTART_S = 0.5
LAST_RESTART_S = 8.0
SETTLED_S = 30.0
"""If a part lived this long, its next restarts begin with the shortest delay again. In seconds."""


class StackError(Exception):
    """The reason why the stack cannot start. The message is one line for a person."""


class Part:
    """A supervised child process. Its output goes directly to `log_path`, so no slow terminal ever stalls it.

    Once it was ready, a process that dies is started again after a growing delay, until `stop`; `report` is told of it
    in one line.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        log_path: Path,
        probe: Callable[[], bool],
        stop_within_s: float,
        report: Callable[[str], None],
    ) -> None:
        self.name = name
        self.log_path = log_path
        self.ready_after_s: float | None = None
        """Seconds from the latest `start` to the first good probe."""
        self.restarted_at: float | None = None
        """`time.monotonic()` of the latest restart by the supervisor."""
        self._command = list(command)
        self._env = dict(env)
        self._probe = probe
        self.stop_within_s = stop_within_s
        self._report = report
        self._lock = threading.Lock()  # held for "may it start, then it starts", so that `stop` never misses a child
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._supervisor: threading.Thread | None = None
        self._started_at = 0.0
        self._last_exit: int | None = None

    def __repr__(self) -> str:
        state = "ready" if self.ready_after_s is not None else "starting"
        return f"<Part {self.name} pid={self.pid} {state if self.pid else 'down'}>"

    @property
    def pid(self) -> int | None:
        """The id of the process that runs now, or None."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    def start(self) -> None:
        """Starts the process and returns at once. `ready` tells when it answers."""
        if self._supervisor is not None:
            raise RuntimeError(f"{self.name} is started already")
        self._stopping = threading.Event()
        self.ready_after_s = self._last_exit = None
        self._started_at = time.monotonic()
        self._supervisor = threading.Thread(target=self._supervise, name=f"supervise {self.name}", daemon=True)
        self._supervisor.start()

    def ready(self) -> bool:
        """Returns whether the part answers now. Raises `StackError` if it died before its first answer."""
        if self.ready_after_s is None and self._last_exit is not None:
            raise StackError(f"{self.name} ended with {describe(self._last_exit)} before it was ready: {self.reason()}")
        if self.pid is None or not self._probe():
            return False
        if self.ready_after_s is None:
            self.ready_after_s = time.monotonic() - self._started_at
        return True

    def wait_ready(self, timeout_s: float = 60) -> None:
        wait_until(self.ready, f"{self.name} answers", timeout_s=timeout_s)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal. After SIGKILL the part is started again; SIGSTOP freezes it and SIGCONT lets it go on."""
        process = self._process
        if process is not None:
            process.send_signal(number)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int | None:
        """Ends the part for good and returns its exit code. SIGKILL follows if it does not obey `number` in time."""
        self.ask_to_stop(number)
        return self.wait_stopped()

    def ask_to_stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Asks the part to end and does not wait, so that several parts can end at the same time."""
        with self._lock:
            self._stopping.set()
        self.send(number)
        self.send(signal.SIGCONT)  # a frozen process obeys nothing but SIGKILL

    def wait_stopped(self) -> int | None:
        if self._supervisor is not None:
            self._supervisor.join(self.stop_within_s)
            if self._supervisor.is_alive():
                self._report(f"{self.name} has not ended within {self.stop_within_s:g} s: killed")
                self._kill_group()
                self._supervisor.join()
        self._supervisor = None
        return self._last_exit

    def log_text(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def reason(self) -> str:
        """Returns its last line of output, where programs say why they ended."""
        lines = [line.strip() for line in self.log_text().splitlines() if line.strip()]
        return lines[-1] if lines else f"it said nothing ({self.log_path})"

    def _supervise(self) -> None:
        # The kernel sends PR_SET_PDEATHSIG when the *thread* that forked the child ends: so the child is forked here,
        # in a thread that outlives it, and never by the short-lived caller of `start`.
        delay_s = FIRST_RESTART_S
        while (process := self._spawn()) is not None:
            born_at = time.monotonic()
            code = process.wait()
            self._kill_group()  # workers that a killed server left behind still hold its port
            self._last_exit = code
            if self._stopping.is_set() or self.ready_after_s is None:
                return  # another start would fail for the same reason, which `ready` reports
            delay_s = FIRST_RESTART_S if time.monotonic() - born_at > SETTLED_S else delay_s
            self._report(f"{self.name} ended with {describe(code)}; it is started again in {delay_s:g} s")
            if self._stopping.wait(delay_s):
                return
            delay_s = min(2 * delay_s, LAST_RESTART_S)
            self.restarted_at = time.monotonic()

    def _spawn(self) -> subprocess.Popen[bytes] | None:
        wrapper = [sys.executable, "-I", "-S", str(DIE_WITH_PARENT), str(os.getpid())]
        self.log_path.parent.mkdir(parents=True, exist_ok=True)  # the folder may have been removed
        with self._lock, self.log_path.open("ab") as log:
            if self._stopping.is_set():
                return None
            self._process = subprocess.Popen(
                wrapper + self._command,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C must reach the supervisor alone, which ends the parts in order
            )
            return self._process

    def _kill_group(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS reports EPERM for a group of zombies
                os.killpg(self._process.pid, signal.SIGKILL)


def describe(exit_code: int) -> str:
    """Returns an exit code in the words of a person: "exit code 1", "SIGKILL"."""
    return f"exit code {exit_code}" if exit_code >= 0 else signal.Signals(-exit_code).name


def wait_until(condition: Callable[[], bool], what: str, *, timeout_s: float, every_s: float = 0.1) -> float:
    """Waits until `condition()` is true and returns the seconds. Raises `StackError` with `what` after `timeout_s`."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > timeout_s:
            raise StackError(f"waited {timeout_s:g} s in vain until {what}")
        time.sleep(every_s)
    return time.monotonic() - began
