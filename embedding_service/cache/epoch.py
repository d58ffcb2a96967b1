"""When everything cached was last cleared: one number that only grows, shared by every process of every gateway.

The epoch is a time in ns of the Unix clock, 0 until the first clear. It stands in three places: in this object, in a
cell of the scoreboard that all worker processes of this gateway share, and in Redis, where other gateways see it. The
names of entries in Redis hold it, so a write that was under way during a clear lands where no reader looks.

    clear        the process that is asked raises its own epoch and the shared cell, then writes Redis
    other worker compares the shared cell with its own epoch before each look-up, and empties its L1 if they differ
    other gateway  reads the epoch from Redis with every look-up, and in a heartbeat each second
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, MutableSequence


class Epoch:
    """The epoch of this process. `forget` empties what this process has cached; it is called once for each raise.

    `cell` holds one integer, which all worker processes of the gateway share; by default a list of this process.
    """

    def __init__(
        self,
        *,
        forget: Callable[[], object],
        cell: MutableSequence[int] | memoryview | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.current = 0
        self.cell = [0] if cell is None else cell
        self._forget = forget
        self._clock_ns = clock_ns

    def __repr__(self) -> str:
        return f"<Epoch {self.current}>"

    def raise_to(self, epoch: int) -> None:
        """Forgets what is cached if `epoch` is later than the current one. A fill claimed before it stores nothing."""
        if epoch > self.current:
            self.current = epoch
            self._tell_workers()
            self._forget()

    def begin(self) -> int:
        """Starts a new epoch and returns it."""
        self.raise_to(max(self.current + 1, self._clock_ns()))
        return self.current

    def catch_up(self) -> None:
        """Follows another worker that was told to clear. Callers on the hot path compare `cell` and `current` first.

        Two workers that raise the cell at once may lose the later epoch between the read and the write of
        `_tell_workers`: a worker that sees less than its own epoch therefore writes again.
        """
        if self.cell[0] < self.current:
            self._tell_workers()
        else:
            self.raise_to(self.cell[0])

    def _tell_workers(self) -> None:
        self.cell[0] = max(self.cell[0], self.current)
