"""Lines of the log that a fault would repeat with every request, for as long as it lasts.

An outage of an hour under load would be a million of them, and where logs are rotated by size
(`compose/production.yml`) they would push out the few that tell how it began.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

MOST = 10  # lines at once: a fault of a moment is told in full
WITHIN_S = 10.0


class Seldom:
    """Writes up to `MOST` lines in `WITHIN_S`, and with the next one how many it has left out."""

    def __init__(self, write: Callable[..., None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._began = clock()
        self._lines = 0

    def __call__(self, message: str, *args: object) -> None:
        now = self._clock()
        if now - self._began >= WITHIN_S:
            if self._lines > MOST:
                left_out, ago_s = self._lines - MOST, now - self._began
                self._write("%d more lines like the next one were left out, the first %.0f s ago", left_out, ago_s)
            self._began, self._lines = now, 0
        self._lines += 1
        if self._lines <= MOST:
            self._write(message, *args)
