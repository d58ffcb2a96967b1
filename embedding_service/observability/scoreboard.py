"""The scoreboard: numbers that all worker processes of one gateway share, in one mapped file of 64-bit integers.

There are no locks. Each process writes only the row of its own slot, and any process reads the sum over all rows. A
process that dies leaves its row as it was, except for its gauges (`withdraw`), and its successor in that slot counts
on from there. Cell 0 of the file is the epoch of the last clear (cache/epoch.py), the one number that every process may
write: it is a time that only grows, so two clears at once end in the later one.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile

_CELL_BYTES = 8
_EPOCH = 0
_HEADER_CELLS = 1

FIELDS = 512  # integers in a row; the metrics of the gateway take about two hundred and fifty
GAUGES = 64  # the last of these fields: what a process holds, as against what it has counted


class Scoreboard:
    """`slots` rows of `fields` integers. Without a file descriptor it belongs to this process alone."""

    def __init__(self, *, fields: int, slots: int = 1, slot: int = 0, fd: int | None = None) -> None:
        size = _CELL_BYTES * (_HEADER_CELLS + slots * fields)
        self._fields = fields
        self._slots = slots
        if fd is None:
            self._map = mmap.mmap(-1, size)
        else:
            if os.fstat(fd).st_size < size:
                os.ftruncate(
                    fd, size
                )  # new bytes are zeros and no process ever shortens the file: any process may come first
            self._map = mmap.mmap(fd, size)
        self._all = memoryview(self._map).cast("q")
        start = _HEADER_CELLS + slot * fields
        self.row = self._all[start : start + fields]
        self.epoch_cell = self._all[_EPOCH : _EPOCH + 1]

    def __repr__(self) -> str:
        return f"<Scoreboard {self._slots} slots of {self._fields} fields>"

    @staticmethod
    def file() -> int:
        """The descriptor of an empty file without a name, for processes to inherit."""
        with tempfile.TemporaryFile() as file:
            return os.dup(file.fileno())

    def largest(self, field: int) -> int:
        """The largest over all processes, dead ones included."""
        return max(self._all[_HEADER_CELLS + slot * self._fields + field] for slot in range(self._slots))

    def total(self, field: int) -> int:
        """The sum over all processes, dead ones included."""
        return sum(self._all[_HEADER_CELLS + slot * self._fields + field] for slot in range(self._slots))


def withdraw(fd: int, slot: int) -> None:
    """Clears the gauges of a process that has ended: what it counted stays, what it held is gone."""
    start = _HEADER_CELLS + (slot + 1) * FIELDS - GAUGES
    with contextlib.suppress(OSError):  # no room on the disk: then it wrote nothing there either
        os.pwrite(fd, bytes(_CELL_BYTES * GAUGES), _CELL_BYTES * start)  # not mapped: descriptors may have run out
