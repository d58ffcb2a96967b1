"""One thread that runs one call at a time, so that what it owns needs no lock."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
import queue
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Self, TypeVar

from embedding_common import errors

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeAlias

    _Call: TypeAlias = tuple[Callable[[], Any], asyncio.Future[Any]]

T = TypeVar("T")

TURNS_TO_WAIT = 8
"""How many urgent calls may go before one that is not urgent, so that they cannot keep it waiting for ever."""


class Worker:
    """A daemon thread behind a queue, as an async context manager.

    Not a ThreadPoolExecutor: the interpreter joins its threads at exit, so one that hangs in native code would keep
    a drained process alive until it is killed.
    """

    def __init__(self, name: str, *, nice: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self._nice = nice
        self.running_since: float | None = None  # the thread writes it, others only read one reference: no lock
        self._clock = clock
        # (its turn, its number among those of one turn, the call); a call of None ends the thread
        self._calls: queue.PriorityQueue[tuple[float, int, _Call | None]] = queue.PriorityQueue()
        self._numbers = itertools.count()
        self._turn = 0.0  # the turn of the call that was taken last; the thread writes it
        self._given = [0.0, 0.0]  # the last turn that was given to calls that can wait, and to urgent ones
        self._pending: set[asyncio.Future[Any]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def __repr__(self) -> str:
        return f"<Worker {self.name} pending={len(self._pending)} running={self.running_since is not None}>"

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._serve, name=self.name, daemon=True).start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._loop = None
        self._put(None)
        for future in self._pending:
            if not future.done():
                future.set_exception(errors.Unavailable("shutting down"))

    async def run(self, work: Callable[[], T], *, urgent: bool = False) -> T:
        """Returns the result of `work()`, or raises what it raises.

        If the caller is cancelled before its turn, `work` is never called. Urgent calls go before others, but while
        both wait one call in `TURNS_TO_WAIT` is not urgent. Raises `Unavailable` if the thread does not run.
        """
        if self._loop is None:
            raise errors.Unavailable("not running")
        future: asyncio.Future[T] = self._loop.create_future()
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        self._put((work, future), urgent=urgent)
        return await future

    def _put(self, call: _Call | None, *, urgent: bool = False) -> None:
        turn = max(self._given[urgent], self._turn) + (1 if urgent else TURNS_TO_WAIT)
        self._given[urgent] = turn
        self._calls.put((math.inf if call is None else turn, next(self._numbers), call))

    def running_for_s(self) -> float:
        """Returns the age of the call that runs now, in seconds; 0 when idle."""
        since = self.running_since
        return 0.0 if since is None else self._clock() - since

    def _serve(self) -> None:
        _be_nice(self._nice)
        while True:
            self._turn, _, call = self._calls.get()
            if call is None:
                return
            self._answer(*call)
            del call  # otherwise a model that was loaded or used stays in memory until the next call, unloaded or not

    def _answer(self, work: Callable[[], Any], future: asyncio.Future[Any]) -> None:
        if future.done():  # its caller has gone; a race here only costs one call
            return
        self.running_since = self._clock()
        result, error = _attempt(work)
        self.running_since = None
        with contextlib.suppress(RuntimeError):  # the loop is closed: no waiter is left
            future.get_loop().call_soon_threadsafe(_settle, future, result, error)


def _be_nice(nice: int) -> None:
    """Lowers the priority of this thread, and of the threads it starts; Linux keeps a nice value for each thread."""
    if nice and sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Returns the result of `work()`, or what it raised, which its waiter gets. Nothing ends the thread."""
    try:
        return work(), None
    except StopIteration as error:  # asyncio refuses it in a future, and the waiter would hang
        return None, RuntimeError(repr(error))
    except Exception as error:  # noqa: BLE001 - it is re-raised where the result is awaited
        return None, error
    except BaseException as error:  # noqa: BLE001 - SystemExit from a library must not end the thread and hang a waiter
        return None, RuntimeError(repr(error))


def _settle(future: asyncio.Future[Any], result: Any, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
