"""A log throttle: it bounds the lines of a fault that would be logged with every request for as long as it lasts.

An outage of an hour under load would be a million lines, and where logs are rotated by size
(`compose/production.yml`) they would push out the few lines that tell how it began.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_LINES = 10  # at once: a short fault is logged in full
WITHIN_S = 10.0


class LogThrottle:
    """Writes up to `MAX_LINES` lines in `WITHIN_S` seconds, and with the next line how many lines it has left out."""

    def __init__(self, write: Callable[..., None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._began = clock()
        self._lines = 0

    def __call__(self, message: str, *args: object) -> None:
        now = self._clock()
        if now - self._began >= WITHIN_S:
            if self._lines > MAX_LINES:
                left_out, ago_s = self._lines - MAX_LINES, now - self._began
                self._write("%d more lines like the next one were left out, the first %.0f s ago", left_out, ago_s)
            self._began, self._lines = now, 0
        self._lines += 1
        if self._lines <= MAX_LINES:
            self._write(message, *args)
