"""How much uncached text each lane may hold. Work is reserved before it is claimed: nothing is taken, then refused.

Cached texts and texts that join a computation cost nothing. A flight, not a request, owns its reservation.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from embedding_service.errors import BodyTooLarge, Overloaded

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from embedding_common.contract import Lane

RETRY_AFTER_BOUNDS_S = (1.0, 30.0)
RATE_WINDOW_S = 0.5  # of the measured drain rate: long enough to hold several calls
RATE_IDLE_S = 10.0  # a longer gap between replies was idleness: a call takes less


class Admission:
    """Bytes of text admitted and not yet settled, by lane."""

    def __init__(self, *, max_pending_bytes: Mapping[Lane, int], clock: Callable[[], float] = time.monotonic) -> None:
        self._max_pending_bytes = max_pending_bytes
        self._pending_bytes = dict.fromkeys(max_pending_bytes, 0)
        self._clock = clock
        self._bytes_per_s = 0.0
        self._window_began = clock()
        self._window_bytes = 0

    def __repr__(self) -> str:
        return f"<Admission {self._pending_bytes} of {self._max_pending_bytes}>"

    def pending_bytes(self, lane: Lane) -> int:
        return self._pending_bytes[lane]

    def reserve(self, lane: Lane, work_bytes: int) -> None:
        """Makes room for that much text. Raises `Overloaded`, or `BodyTooLarge` if it can never fit."""
        most, pending = self._max_pending_bytes[lane], self._pending_bytes[lane]
        if work_bytes > most:
            raise BodyTooLarge(
                f"texts: the {lane} lane holds at most {most} bytes of uncached text, got {work_bytes}",
                field="texts",
                limit=most,
                value=work_bytes,
            )
        if pending + work_bytes > most:
            raise Overloaded(
                f"texts: the {lane} lane is full: {pending} of {most} bytes are waiting, {work_bytes} more do not fit",
                field="texts",
                limit=most,
                value=work_bytes,
                retry_after_s=self._seconds_for(pending + work_bytes - most),
            )
        self._pending_bytes[lane] = pending + work_bytes

    def release(self, lane: Lane, work_bytes: int) -> None:
        """Gives reserved room back."""
        self._pending_bytes[lane] -= work_bytes

    def drained(self, work_bytes: int) -> None:
        """That much text has just been computed: what the drain rate is measured from."""
        now = self._clock()
        elapsed_s = now - self._window_began
        if elapsed_s > RATE_IDLE_S:  # nothing to do is not slowness
            self._window_began, self._window_bytes = now, 0
            return
        self._window_bytes += work_bytes
        if elapsed_s >= RATE_WINDOW_S:
            rate = self._window_bytes / elapsed_s
            self._bytes_per_s = rate if self._bytes_per_s == 0 else 0.7 * self._bytes_per_s + 0.3 * rate
            self._window_began, self._window_bytes = now, 0

    def _seconds_for(self, work_bytes: int) -> float:
        least, most = RETRY_AFTER_BOUNDS_S
        return least if self._bytes_per_s == 0 else min(most, max(least, work_bytes / self._bytes_per_s))
