"""What runs next: pure functions that choose a lane and a batch, and the grid of shapes that batches are padded to."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from embedding_common.contract import Lane

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# (most, step): up to this many rows, or tokens, the step is that; padding a larger number to a wider step costs no
# larger share of it
_ROW_STEPS = ((8, 1), (16, 2), (64, 4))
_LENGTH_STEPS = ((8, 8), (24, 4), (128, 8), (256, 16))
_WIDEST_ROWS = 16
_WIDEST_SHARE = 8  # above the table a step is an eighth of the length, rounded up to a power of two


@dataclass(frozen=True, slots=True)
class Grid:
    """The few shapes (rows, length) that a compiled backend computes, so that each is slow once, before any request.

    `lengths` are in tokens and ascend; the last is the longest text that the model reads. Without any, all shapes are
    equal, and nothing is padded to a grid.

    A compiled graph prepares itself for every shape it has not seen, which costs up to the shape's own run time:
    measured with random lengths against shapes seen before, bfloat16 loses a tenth of its throughput and int8 a third.
    So lengths are padded up to steps that are at most a quarter of them, rows beyond eight to even counts and multiples
    of four. Steps of four tokens beyond 24 gain nothing: attention computes what is left of a length beyond a multiple
    of 16 one by one, so that 28 tokens take as long as 32 (measured).
    """

    lengths: tuple[int, ...] = ()

    @classmethod
    def up_to(cls, max_tokens: int) -> Grid:
        """Returns the grid of a model that reads at most `max_tokens` tokens."""
        return cls((*_steps(max_tokens), max_tokens))

    def length(self, tokens: int) -> int:
        """Returns the length that a text of that many tokens is padded to."""
        step = bisect_left(self.lengths, tokens)
        return self.lengths[step] if step < len(self.lengths) else tokens

    def rows(self, rows: int) -> int:
        """Returns the count that so many rows are padded to."""
        if not self.lengths:
            return rows
        step = next((step for most, step in _ROW_STEPS if rows <= most), _WIDEST_ROWS)
        return -(-rows // step) * step

    def tokens(self, rows: int, longest: int) -> int:
        """Returns the tokens computed for so many texts, padding included."""
        return self.rows(rows) * self.length(longest)

    def shapes(self, max_tokens: int, max_texts: int) -> list[tuple[int, int]]:
        """Returns (rows, length) of each batch of at most so many tokens and texts, and of each longer text alone."""
        return [
            (rows, length)
            for length in self.lengths
            for rows in range(1, self.rows(max_texts) + 1)
            if rows == self.rows(rows) and (rows == 1 or rows * length <= max_tokens)
        ]


def _steps(max_tokens: int) -> Iterator[int]:
    """Yields the lengths below `max_tokens`."""
    length = 0
    for most, step in _LENGTH_STEPS:
        while length < most:
            length += step
            if length >= max_tokens:
                return
            yield length
    while True:
        length += 1 << ((length // _WIDEST_SHARE).bit_length())
        if length >= max_tokens:
            return
        yield length


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """How large a batch may be, and how long a text may be passed over.

    `max_tokens` counts padding: rows times the longest of them, on `grid`. One text alone may exceed it.
    `patience_s` is how long a request may be passed over in favour of texts of better-fitting length.
    """

    max_texts: int
    max_tokens: int
    patience_s: float
    grid: Grid = field(default_factory=Grid)


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What one batch was: counts are texts and tokens, times are seconds."""

    lane: Lane
    texts: int
    failed: int
    tokens: int
    padded_tokens: int
    took_s: float
    oldest_wait_s: float


class Candidate(Protocol):
    """A waiting text."""

    @property
    def length(self) -> int:
        """Its tokens, padded to the grid."""

    @property
    def passed_at(self) -> float:
        """When a younger request was first served before its own; inf: never."""


def choose_lane(*, interactive: bool, bulk: bool, credit: float, bulk_share: float) -> tuple[Lane, float]:
    """Returns the lane of the next batch, given in which lanes texts wait, and bulk's new credit.

    Interactive goes first; each time bulk is passed over it earns its share, and at 1 it has earned a batch.
    """
    if not bulk:
        return Lane.INTERACTIVE, 0.0
    if not interactive:
        return Lane.BULK, 0.0
    credit += bulk_share
    if credit >= 1 - 1e-9:  # ten times 0.1 is less than 1
        return Lane.BULK, credit - 1
    return Lane.INTERACTIVE, credit


def pick(window: Sequence[Candidate], *, now: float, limits: BatchLimits) -> list[int]:
    """Returns the positions of the next batch in `window`, which is never empty and has the oldest text first.

    The oldest text chooses the length and those closest to it join, for padding is computed like text. Texts of
    requests that were passed over for longer than the patience come before all others, longest passed over first.
    Within one request the order is free: its reply waits for all of it anyway.
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
