"""What this process holds of the machine's memory, and giving back what it no longer needs."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_STATM = Path("/proc/self/statm")


def resident_bytes() -> int:
    """Of this process, now; 0 where the system does not tell."""
    try:
        return int(_STATM.read_text().split()[1]) * _PAGE_BYTES
    except OSError:
        return 0


def give_back() -> None:
    """Collects garbage and hands free pages of the heap to the system: glibc keeps them otherwise, for ever."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
