"""Several gateway processes on one listening socket: started, watched, replaced, ended.

The parent binds the socket and makes the board (`board.py`); each worker inherits both, and a pipe that tells it when
the parent is gone. The kernel hands a connection to whichever worker accepts first. A worker that ends is replaced in
its slot, where its counters go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket

log = logging.getLogger(__name__)

RESTART_AFTER_S = 0.5
MAX_RESTART_AFTER_S = 10.0
LIVED_S = 10.0  # a worker that served this long had started well: its successor need not wait


@dataclass(frozen=True, slots=True)
class Place:
    """What a worker inherits: its slot among `slots`, and three file descriptors."""

    slot: int
    slots: int
    listen_fd: int
    board_fd: int
    lifeline_fd: int

    def to_argument(self) -> str:
        return f"{self.slot}/{self.slots}:{self.listen_fd},{self.board_fd},{self.lifeline_fd}"

    @classmethod
    def from_argument(cls, text: str) -> Place:
        """Raises `ValueError`."""
        slots, _, fds = text.partition(":")
        slot, _, of = slots.partition("/")
        listen_fd, board_fd, lifeline_fd = map(int, fds.split(","))
        return cls(int(slot), int(of), listen_fd, board_fd, lifeline_fd)


class Supervisor:
    """Keeps `slots` workers running until SIGTERM or SIGINT, then drains them all at once."""

    def __init__(self, *, listener: socket.socket, board_fd: int, slots: int, stop_within_s: float) -> None:
        self._slots = slots
        self._stop_within_s = stop_within_s
        self._lifeline_fd, self._own_end_fd = os.pipe()  # nobody writes; the kernel closes our end if we die
        self._fds = (listener.fileno(), board_fd, self._lifeline_fd)
        self._stop = asyncio.Event()
        self.pids: dict[int, int] = {}

    def __repr__(self) -> str:
        return f"<Supervisor {len(self.pids)} of {self._slots} workers>"

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for ending in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(ending, self._stop.set)
        async with asyncio.TaskGroup() as workers:
            for slot in range(self._slots):
                workers.create_task(self._keep(slot))

    async def _keep(self, slot: int) -> None:
        pause_s = RESTART_AFTER_S
        while not self._stop.is_set():
            started = asyncio.get_running_loop().time()
            process = await self._start(slot)
            await self._until_ended_or_stopped(process)
            del self.pids[slot]
            if self._stop.is_set():
                return
            lived = asyncio.get_running_loop().time() - started > LIVED_S
            pause_s = RESTART_AFTER_S if lived else min(MAX_RESTART_AFTER_S, 2 * pause_s)
            log.error("worker %d (pid %d) ended with %s", slot, process.pid, process.returncode)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), pause_s)

    async def _start(self, slot: int) -> asyncio.subprocess.Process:
        place = Place(slot, self._slots, *self._fds)
        command = (sys.executable, "-m", "embedding_service", "--worker", place.to_argument())
        # a session of its own: Ctrl-C in a terminal reaches the parent alone, which then ends all workers once
        process = await asyncio.create_subprocess_exec(*command, pass_fds=self._fds, start_new_session=True)
        self.pids[slot] = process.pid
        log.info("worker %d is pid %d", slot, process.pid)
        return process

    async def _until_ended_or_stopped(self, process: asyncio.subprocess.Process) -> None:
        ended, stopped = asyncio.create_task(process.wait()), asyncio.create_task(self._stop.wait())
        await asyncio.wait((ended, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not ended.done():
            process.terminate()
            await asyncio.wait((ended,), timeout=self._stop_within_s)
        if not ended.done():
            log.error("pid %d is killed: it did not end within %.0f s", process.pid, self._stop_within_s)
            process.kill()
        await ended


def end_with_parent(lifeline_fd: int) -> None:
    """In a worker, once its loop runs: drains as soon as the parent is gone, however it went."""
    loop = asyncio.get_running_loop()

    def parent_is_gone() -> None:
        loop.remove_reader(lifeline_fd)
        os.kill(os.getpid(), signal.SIGTERM)

    loop.add_reader(lifeline_fd, parent_is_gone)
