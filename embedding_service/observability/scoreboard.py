"""Numbers that all gateway processes of one listening socket share: one mapped file of 64-bit integers, no locks.

Each process writes only the row of its own slot; anyone reads the sum over all rows. A process that dies leaves its row
as it was, but for its gauges (`withdraw`), and its successor in that slot counts on from there. Cell 0 of the file is
the epoch of the last clear, the one number that every process may write: it is a time that only grows, so two clears
at once end in the later one.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile

_CELL_BYTES = 8
_EPOCH = 0
_HEADER_CELLS = 1

FIELDS = 512  # of a row of the gateway's figures, which take about two hundred and fifty
GAUGES = 64  # of them, the last: what a process holds, as against what it has counted


class Board:
    """`slots` rows of `fields` integers. Without a file descriptor: of this process alone."""

    def __init__(self, *, fields: int, slots: int = 1, slot: int = 0, fd: int | None = None) -> None:
        size = _CELL_BYTES * (_HEADER_CELLS + slots * fields)
        self._fields = fields
        self._slots = slots
        if fd is None:
            self._map = mmap.mmap(-1, size)
        else:
            if os.fstat(fd).st_size < size:
                os.ftruncate(fd, size)  # new bytes are zeros, and nobody ever shortens it: any process may come first
            self._map = mmap.mmap(fd, size)
        self._all = memoryview(self._map).cast("q")
        start = _HEADER_CELLS + slot * fields
        self.row = self._all[start : start + fields]

    def __repr__(self) -> str:
        return f"<Board {self._slots} slots of {self._fields} fields>"

    @staticmethod
    def file() -> int:
        """A descriptor of an empty file without a name, for processes to inherit."""
        with tempfile.TemporaryFile() as file:
            return os.dup(file.fileno())

    @property
    def epoch(self) -> int:
        return self._all[_EPOCH]

    def raise_epoch(self, epoch: int) -> None:
        """Tells every process that nothing cached before `epoch` counts.

        Two at once may lose the later one between the read and the write; whoever raised it writes again when it
        sees less (`Fill.catch_up`).
        """
        self._all[_EPOCH] = max(self._all[_EPOCH], epoch)

    def largest(self, field: int) -> int:
        """The largest over all processes, dead ones included."""
        return max(self._all[_HEADER_CELLS + slot * self._fields + field] for slot in range(self._slots))

    def total(self, field: int) -> int:
        """The sum over all processes, dead ones included."""
        return sum(self._all[_HEADER_CELLS + slot * self._fields + field] for slot in range(self._slots))


def withdraw(fd: int, slot: int) -> None:
    """For a process that has ended, however: what it counted stays, what it held is no more."""
    start = _HEADER_CELLS + (slot + 1) * FIELDS - GAUGES
    with contextlib.suppress(OSError):  # no room on the disk: then it wrote nothing there either
        os.pwrite(fd, bytes(_CELL_BYTES * GAUGES), _CELL_BYTES * start)  # not mapped: descriptors may have run out
