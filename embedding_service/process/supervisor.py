"""Gateway processes on one listening socket: how they are started, watched, replaced and ended.

The parent binds the socket and makes the scoreboard (`observability/scoreboard.py`). Each worker inherits both, and a
pipe that closes when the parent is gone. The kernel hands a connection to the worker that accepts first. A worker that
dies is replaced.

SIGHUP replaces all of them, one after the other, and loses no request: a successor is started, and once it serves and
knows a model, its predecessor is told to retire (SIGHUP too): that one accepts nothing more, closes each connection
with its next reply, and finishes what is in hand. A successor that does not come so far is ended, and the old one
stays. Why this is not uvicorn's process manager: docs/adr/0009-own-supervisor.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

log = logging.getLogger(__name__)

RESTART_AFTER_S = 0.5
"""The pause, in seconds, before a dead worker is started again. It doubles with each early death."""
MAX_RESTART_AFTER_S = 10.0
"""The longest pause, in seconds, before a worker is started again."""
LIVED_S = 10.0
"""A worker that has run for so many seconds had started well: its successor gets the shortest pause."""
READY_WITHIN_S = 30.0
"""How long, in seconds, a successor may take until it is ready: one to start, and more on a machine that is busy."""
READY, SERVING = b"r", b"s"
"""The report of a worker once it serves: with a model known, or without."""
_UNFIT = {
    None: f"was not ready within {READY_WITHIN_S:.0f} s",
    b"": "ended before it served",
    SERVING: "serves, but knows no model",
    READY: "came too late",
}


@dataclass(frozen=True, slots=True)
class WorkerInheritance:
    """What a worker inherits: its row of the scoreboard's rows, and four file descriptors.

    `lifeline_fd` is a pipe that closes when the parent is gone; the worker reports to `report_fd` once it serves.
    """

    row: int
    rows: int
    listen_fd: int
    scoreboard_fd: int
    lifeline_fd: int
    report_fd: int

    def to_argument(self) -> str:
        """Returns it as one argument of a command line."""
        return f"{self.row}/{self.rows}:{self.listen_fd},{self.scoreboard_fd},{self.lifeline_fd},{self.report_fd}"

    @classmethod
    def from_argument(cls, text: str) -> WorkerInheritance:
        """Reads what `to_argument` writes. Raises `ValueError`."""
        rows, _, fds = text.partition(":")
        row, _, count = rows.partition("/")
        listen_fd, scoreboard_fd, lifeline_fd, report_fd = map(int, fds.split(","))
        return cls(int(row), int(count), listen_fd, scoreboard_fd, lifeline_fd, report_fd)


@dataclass(eq=False, slots=True)
class _Worker:
    """A process and its row. `report` is `READY`, `SERVING`, or empty if the process ended before it served."""

    process: asyncio.subprocess.Process
    row: int
    report: asyncio.Future[bytes]
    started_at: float
    retired: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Supervisor:
    """Keeps `workers` workers until SIGTERM or SIGINT, then drains them all at once; replaces them at SIGHUP.

    `on_worker_end(row)` is called once for each process that has ended. `stop_within_s` is how long a worker may take
    to end before it is killed.
    """

    def __init__(
        self,
        *,
        listener: socket.socket,
        scoreboard_fd: int,
        workers: int,
        stop_within_s: float,
        on_worker_end: Callable[[int], None],
    ) -> None:
        self._wanted = workers
        self._on_worker_end = on_worker_end
        self._stop_within_s = stop_within_s
        self._lifeline_fd, self._own_end_fd = os.pipe()  # never written to; the kernel closes our end if we die
        self._fds = (listener.fileno(), scoreboard_fd, self._lifeline_fd)
        self._rows = workers + 1  # one is spare: predecessor and successor count side by side for a while
        self._free_rows = list(reversed(range(self._rows)))  # a stack: the next worker takes the row of the last to end
        self._stop = asyncio.Event()
        self._replace_all = asyncio.Event()
        self._workers: list[_Worker] = []
        self._served = False
        self._exit_code = 0

    def __repr__(self) -> str:
        return f"<Supervisor {len(self._workers)} of {self._wanted} workers>"

    async def run(self) -> int:
        """Runs until told to stop. Returns the exit code: 1 if the first worker ended before it served."""
        loop = asyncio.get_running_loop()
        for ending in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(ending, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._replace_all.set)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._wanted):
                tasks.create_task(self._keep(await self._start()))
            replacing = tasks.create_task(self._replace_all_when_asked(tasks))
            await self._stop.wait()
            replacing.cancel()
        return self._exit_code

    async def _keep(self, worker: _Worker) -> None:
        """Keeps a worker, and the one started in its place if it dies, until it is retired or all shall stop."""
        pause_s = RESTART_AFTER_S
        while True:
            await self._until_ended_or_stopped(worker)
            if worker.retired or self._stop.is_set():
                return
            log.error("worker pid %d ended with %s", worker.process.pid, worker.process.returncode)
            if not (await worker.report or self._served):
                self._exit_code = 1
                self._stop.set()  # what kept the first from starting would keep the next ones too
                return
            lived = asyncio.get_running_loop().time() - worker.started_at > LIVED_S
            pause_s = RESTART_AFTER_S if lived else min(MAX_RESTART_AFTER_S, 2 * pause_s)
            successor = await self._start_after(pause_s)
            if successor is None:
                return
            worker = successor

    async def _start_after(self, pause_s: float) -> _Worker | None:
        """Starts a worker, and tries again while no process can be had. Returns None if all shall stop meanwhile."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), pause_s)
            if self._stop.is_set():
                return None
            try:
                return await self._start()
            except OSError as failure:
                log.error("a worker cannot be started: %s", failure)  # noqa: TRY400 - a trace says no more
                pause_s = min(MAX_RESTART_AFTER_S, 2 * pause_s)

    async def _replace_all_when_asked(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            await self._replace_all.wait()
            self._replace_all.clear()
            for worker in list(self._workers):
                if not (worker.ended.is_set() or await self._replace(worker, tasks)):
                    break

    async def _replace(self, old: _Worker, tasks: asyncio.TaskGroup) -> bool:
        """Replaces `old`. Returns whether a successor now serves in its place, and `old` has ended."""
        try:
            successor = await self._start()
        except OSError as failure:  # no memory, no file descriptors, or no interpreter where it used to be
            log.error("pid %d is not replaced: its successor cannot be started: %s", old.process.pid, failure)  # noqa: TRY400
            return False
        fit, report = False, None
        try:
            await asyncio.wait((successor.report,), timeout=READY_WITHIN_S)
            report = successor.report.result() if successor.report.done() else None
            fit = report == READY and not old.ended.is_set()
        finally:
            if not fit:
                await self._end(successor)
        if not fit:
            log.error("pid %d is not replaced: its successor %s", old.process.pid, _UNFIT[report])
            return False
        tasks.create_task(self._keep(successor))
        old.retired = True
        if old.process.returncode is None:  # otherwise it has died just now, and is not started again
            old.process.send_signal(signal.SIGHUP)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(old.ended.wait(), self._stop_within_s)
        if not old.ended.is_set():
            self._kill(old)
            await old.ended.wait()
        return True

    async def _start(self) -> _Worker:
        """Starts a worker. Raises `OSError` if no process can be had now, which must not end the other workers."""
        loop = asyncio.get_running_loop()
        report_fd, its_end_fd = os.pipe()
        row = self._free_rows.pop()
        fds = (*self._fds, its_end_fd)
        inheritance = WorkerInheritance(row, self._rows, *fds)
        command = (sys.executable, "-m", "embedding_service.process.worker", inheritance.to_argument())
        # a session of its own: Ctrl-C in a terminal reaches the parent alone, which then ends all workers once
        try:
            process = await asyncio.create_subprocess_exec(*command, pass_fds=fds, start_new_session=True)
        except OSError:
            os.close(report_fd)
            self._free_rows.append(row)
            raise
        finally:
            os.close(its_end_fd)
        worker = _Worker(process, row, loop.create_future(), loop.time())
        loop.add_reader(report_fd, self._read_report, worker, report_fd)
        self._workers.append(worker)
        log.info("a worker is pid %d", process.pid)
        return worker

    def _read_report(self, worker: _Worker, report_fd: int) -> None:
        asyncio.get_running_loop().remove_reader(report_fd)
        report = os.read(report_fd, 1)
        os.close(report_fd)
        self._served = self._served or bool(report)
        worker.report.set_result(report)

    async def _until_ended_or_stopped(self, worker: _Worker) -> None:
        ended, stopped = asyncio.create_task(worker.process.wait()), asyncio.create_task(self._stop.wait())
        await asyncio.wait((ended, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        await self._end(worker)

    async def _end(self, worker: _Worker) -> None:
        """Tells a worker to end, unless it has ended or been told before, and waits for it; kills it if it must."""
        if worker.process.returncode is None and not worker.retired:
            worker.process.terminate()
        try:
            await asyncio.wait_for(worker.process.wait(), self._stop_within_s)
        except TimeoutError:
            self._kill(worker)
            await worker.process.wait()
        self._workers.remove(worker)
        self._on_worker_end(worker.row)
        self._free_rows.append(worker.row)
        worker.ended.set()

    def _kill(self, worker: _Worker) -> None:
        log.error("pid %d is killed: it did not end within %.0f s", worker.process.pid, self._stop_within_s)
        worker.process.kill()


def report_serving(report_fd: int, *, ready: bool) -> None:
    """Reports to the parent that this worker serves; `ready` says whether it knows a model."""
    os.write(report_fd, READY if ready else SERVING)
    os.close(report_fd)


def end_with_parent(lifeline_fd: int) -> None:
    """Drains this worker as soon as the parent is gone, however it ended. Called once the worker's event loop runs."""
    loop = asyncio.get_running_loop()

    def parent_is_gone() -> None:
        loop.remove_reader(lifeline_fd)
        os.kill(os.getpid(), signal.SIGTERM)

    loop.add_reader(lifeline_fd, parent_is_gone)
