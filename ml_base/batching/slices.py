"""What runs next: pure functions that choose a lane and cut a slice from the texts that wait in it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from embedding_common.contract import Lane
from ml_base.batching.shapes import Grid

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class SliceLimits:
    """`max_tokens` counts padding: rows x the longest of them, on `grid`. One text alone may exceed it.

    `patience_s`: how long a request may be passed over in favour of texts of better-fitting length.
    """

    max_texts: int
    max_tokens: int
    patience_s: float
    grid: Grid = field(default_factory=Grid)


@dataclass(frozen=True, slots=True)
class SliceReport:
    """What one slice was: counts are texts and tokens, times seconds."""

    lane: Lane
    texts: int
    failed: int
    tokens: int
    padded_tokens: int
    took_s: float
    oldest_wait_s: float


class Candidate(Protocol):
    """A waiting text: its tokens as they are padded, and since when younger requests have been served before its own
    (inf: never).
    """

    @property
    def length(self) -> int: ...
    @property
    def passed_at(self) -> float: ...


def choose_lane(*, interactive: bool, bulk: bool, credit: float, bulk_share: float) -> tuple[Lane, float]:
    """The lane of the next slice, given in which lanes texts wait, and bulk's new credit.

    Interactive goes first; each time bulk is passed over it earns its share, and at 1 it has earned a slice.
    """
    if not bulk:
        return Lane.INTERACTIVE, 0.0
    if not interactive:
        return Lane.BULK, 0.0
    credit += bulk_share
    if credit >= 1 - 1e-9:  # ten times 0.1 is less than 1
        return Lane.BULK, credit - 1
    return Lane.INTERACTIVE, credit


def pick(window: Sequence[Candidate], *, now: float, limits: SliceLimits) -> list[int]:
    """Positions of the next slice in `window` (never empty, oldest first).

    The oldest text chooses the length and those closest to it join, for padding is computed like text. Texts of
    requests that were passed over for longer than the patience come before all others, longest passed over first.
    Within one request order is free: its reply waits for all of it anyway.
    """
    rows = limits.grid.rows
    passed = [c.passed_at if now - c.passed_at > limits.patience_s else math.inf for c in window]
    leader = min(range(len(window)), key=lambda i: (passed[i], i))
    length = window[leader].length
    by_fit = sorted(range(len(window)), key=lambda i: (passed[i], abs(window[i].length - length), i))
    taken = [leader]
    longest = length
    for position in by_fit:
        if len(taken) >= limits.max_texts or longest * rows(len(taken) + 1) > limits.max_tokens:
            break
        widest = max(longest, window[position].length)
        if position != leader and widest * rows(len(taken) + 1) <= limits.max_tokens:
            taken.append(position)
            longest = widest
    return taken
