"""Gateway processes on one listening socket: started, watched, replaced, ended.

The parent binds the socket and makes the board (`board.py`); each worker inherits both, and a pipe that tells it when
the parent is gone. The kernel hands a connection to whichever worker accepts first. A worker that dies is replaced.

SIGHUP replaces all of them, one after the other, and loses no request: a successor is started, and once it serves and
knows a model, its predecessor is told to retire (SIGHUP too): that one accepts nothing more, closes each connection
with its next reply, and finishes what is in hand. A successor that does not come so far is ended, and the old one
stays.
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
MAX_RESTART_AFTER_S = 10.0
LIVED_S = 10.0  # a worker that served this long had started well: its successor need not wait
READY_WITHIN_S = 30.0  # of a successor: a second to start, and some for a machine that is busy
READY, SERVING = b"r", b"s"
"""What a worker says once it serves: with a model known, or without."""
_UNFIT = {
    None: f"was not ready within {READY_WITHIN_S:.0f} s",
    b"": "ended before it served",
    SERVING: "serves, but knows no model",
    READY: "came too late",
}


@dataclass(frozen=True, slots=True)
class Place:
    """What a worker inherits: its row of the board's, and four file descriptors."""

    row: int
    rows: int
    listen_fd: int
    board_fd: int
    lifeline_fd: int
    word_fd: int

    def to_argument(self) -> str:
        return f"{self.row}/{self.rows}:{self.listen_fd},{self.board_fd},{self.lifeline_fd},{self.word_fd}"

    @classmethod
    def from_argument(cls, text: str) -> Place:
        """Raises `ValueError`."""
        rows, _, fds = text.partition(":")
        row, _, of = rows.partition("/")
        listen_fd, board_fd, lifeline_fd, word_fd = map(int, fds.split(","))
        return cls(int(row), int(of), listen_fd, board_fd, lifeline_fd, word_fd)


@dataclass(eq=False, slots=True)
class _Worker:
    """A process, its row, and its word: `READY`, `SERVING`, or nothing if it ended before it served."""

    process: asyncio.subprocess.Process
    row: int
    word: asyncio.Future[bytes]
    started_at: float
    retired: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)


class Supervisor:
    """Keeps `workers` workers until SIGTERM or SIGINT, then drains them all at once; replaces them at SIGHUP.

    `ended(row)` is called once for each that is no more.
    """

    def __init__(
        self,
        *,
        listener: socket.socket,
        board_fd: int,
        workers: int,
        stop_within_s: float,
        ended: Callable[[int], None],
    ) -> None:
        self._wanted = workers
        self._ended = ended
        self._stop_within_s = stop_within_s
        self._lifeline_fd, self._own_end_fd = os.pipe()  # nobody writes; the kernel closes our end if we die
        self._fds = (listener.fileno(), board_fd, self._lifeline_fd)
        self._rows = workers + 1  # one spare: predecessor and successor count side by side for a while
        self._free_rows = list(reversed(range(self._rows)))  # a stack: who dies leaves its row to whoever comes next
        self._stop = asyncio.Event()
        self._renew = asyncio.Event()
        self._workers: list[_Worker] = []
        self._served = False
        self._exit_code = 0

    def __repr__(self) -> str:
        return f"<Supervisor {len(self._workers)} of {self._wanted} workers>"

    async def run(self) -> int:
        """Until told to stop. The exit code: 1 if the first worker ended before it served."""
        loop = asyncio.get_running_loop()
        for ending in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(ending, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._renew.set)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._wanted):
                tasks.create_task(self._keep(await self._start()))
            renewing = tasks.create_task(self._renew_when_asked(tasks))
            await self._stop.wait()
            renewing.cancel()
        return self._exit_code

    async def _keep(self, worker: _Worker) -> None:
        """A worker, and whoever comes after it if it dies, until it is retired or all shall stop."""
        pause_s = RESTART_AFTER_S
        while True:
            await self._until_ended_or_stopped(worker)
            if worker.retired or self._stop.is_set():
                return
            log.error("worker pid %d ended with %s", worker.process.pid, worker.process.returncode)
            if not (await worker.word or self._served):
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
        """Tries for as long as no process can be had; None if all shall stop meanwhile."""
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

    async def _renew_when_asked(self, tasks: asyncio.TaskGroup) -> None:
        while True:
            await self._renew.wait()
            self._renew.clear()
            for worker in list(self._workers):
                if not (worker.over.is_set() or await self._replace(worker, tasks)):
                    break

    async def _replace(self, old: _Worker, tasks: asyncio.TaskGroup) -> bool:
        """Whether a successor now serves in the place of `old`, which has ended."""
        try:
            successor = await self._start()
        except OSError as failure:  # no memory, no file descriptors, or no interpreter where it used to be
            log.error("pid %d is not replaced: its successor cannot be started: %s", old.process.pid, failure)  # noqa: TRY400
            return False
        fit, said = False, None
        try:
            await asyncio.wait((successor.word,), timeout=READY_WITHIN_S)
            said = successor.word.result() if successor.word.done() else None
            fit = said == READY and not old.over.is_set()
        finally:
            if not fit:
                await self._end(successor)
        if not fit:
            log.error("pid %d is not replaced: its successor %s", old.process.pid, _UNFIT[said])
            return False
        tasks.create_task(self._keep(successor))
        old.retired = True
        if old.process.returncode is None:  # else it has died just now, and is not started again
            old.process.send_signal(signal.SIGHUP)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(old.over.wait(), self._stop_within_s)
        if not old.over.is_set():
            self._kill(old)
            await old.over.wait()
        return True

    async def _start(self) -> _Worker:
        """Raises `OSError` if there can be no such process now; the others must not suffer for it."""
        loop = asyncio.get_running_loop()
        word_fd, its_end_fd = os.pipe()
        row = self._free_rows.pop()
        fds = (*self._fds, its_end_fd)
        command = (sys.executable, "-m", "embedding_service.process.worker", Place(row, self._rows, *fds).to_argument())
        # a session of its own: Ctrl-C in a terminal reaches the parent alone, which then ends all workers once
        try:
            process = await asyncio.create_subprocess_exec(*command, pass_fds=fds, start_new_session=True)
        except OSError:
            os.close(word_fd)
            self._free_rows.append(row)
            raise
        finally:
            os.close(its_end_fd)
        worker = _Worker(process, row, loop.create_future(), loop.time())
        loop.add_reader(word_fd, self._hear, worker, word_fd)
        self._workers.append(worker)
        log.info("a worker is pid %d", process.pid)
        return worker

    def _hear(self, worker: _Worker, word_fd: int) -> None:
        asyncio.get_running_loop().remove_reader(word_fd)
        word = os.read(word_fd, 1)
        os.close(word_fd)
        self._served = self._served or bool(word)
        worker.word.set_result(word)

    async def _until_ended_or_stopped(self, worker: _Worker) -> None:
        ended, stopped = asyncio.create_task(worker.process.wait()), asyncio.create_task(self._stop.wait())
        await asyncio.wait((ended, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        await self._end(worker)

    async def _end(self, worker: _Worker) -> None:
        """Tells it to, if it has not ended or been told before, and sees that it does."""
        if worker.process.returncode is None and not worker.retired:
            worker.process.terminate()
        try:
            await asyncio.wait_for(worker.process.wait(), self._stop_within_s)
        except TimeoutError:
            self._kill(worker)
            await worker.process.wait()
        self._workers.remove(worker)
        self._ended(worker.row)
        self._free_rows.append(worker.row)
        worker.over.set()

    def _kill(self, worker: _Worker) -> None:
        log.error("pid %d is killed: it did not end within %.0f s", worker.process.pid, self._stop_within_s)
        worker.process.kill()


def tell(word_fd: int, *, ready: bool) -> None:
    """In a worker, once it serves: says so to the parent."""
    os.write(word_fd, READY if ready else SERVING)
    os.close(word_fd)


def end_with_parent(lifeline_fd: int) -> None:
    """In a worker, once its loop runs: drains as soon as the parent is gone, however it went."""
    loop = asyncio.get_running_loop()

    def parent_is_gone() -> None:
        loop.remove_reader(lifeline_fd)
        os.kill(os.getpid(), signal.SIGTERM)

    loop.add_reader(lifeline_fd, parent_is_gone)
