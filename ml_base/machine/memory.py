"""The memory of this process: how much it holds, and how it releases what it no longer needs."""

from __future__ import annotations

import ctypes
import gc
import os
from pathlib import Path

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_STATM = Path("/proc/self/statm")


def resident_bytes() -> int:
    """Returns the memory that this process holds now, in bytes; 0 where the system does not say."""
    try:
        return int(_STATM.read_text().split()[1]) * _PAGE_BYTES
    except OSError:
        return 0


def release_memory() -> None:
    """Collects garbage and returns free pages of the heap to the system, which glibc would keep for ever."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
    if trim is not None:
        trim(0)
