"""The few shapes (rows, length) that a compiled backend computes, so that each is slow once, before anybody waits.

A compiled graph prepares itself for every shape it has not seen, which costs up to the shape's own run time: measured
with random lengths against shapes seen before, bfloat16 loses a tenth of its throughput and int8 a third. So lengths
are padded up to steps that are at most a quarter of them, rows beyond eight to even counts and multiples of four.
Steps of four tokens beyond 24 gain nothing: attention computes what is left of a length beyond a multiple of 16 one
by one, so that 28 tokens take as long as 32 (measured).
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# up to this many rows, or tokens, the step is that; padding a longer list to a wider step costs no larger share
_ROW_STEPS = ((8, 1), (16, 2), (64, 4))
_LENGTH_STEPS = ((8, 8), (24, 4), (128, 8), (256, 16))
_WIDEST_ROWS = 16
_WIDEST_SHARE = 8  # above the table a step is an eighth of the length, rounded up to a power of two


@dataclass(frozen=True, slots=True)
class Grid:
    """Ascending lengths in tokens, the last the longest text the model reads. Without any, every shape is as good."""

    lengths: tuple[int, ...] = ()

    @classmethod
    def up_to(cls, max_tokens: int) -> Grid:
        return cls((*_steps(max_tokens), max_tokens))

    def length(self, tokens: int) -> int:
        """What a text of that many tokens is padded to."""
        place = bisect_left(self.lengths, tokens)
        return self.lengths[place] if place < len(self.lengths) else tokens

    def rows(self, rows: int) -> int:
        """What that many rows are padded to."""
        if not self.lengths:
            return rows
        step = next((step for most, step in _ROW_STEPS if rows <= most), _WIDEST_ROWS)
        return -(-rows // step) * step

    def tokens(self, rows: int, longest: int) -> int:
        """Tokens computed for that many texts, padding included."""
        return self.rows(rows) * self.length(longest)

    def shapes(self, max_tokens: int, max_texts: int) -> list[tuple[int, int]]:
        """(rows, length) of every slice of at most that many tokens and texts, and of each longer text alone."""
        return [
            (rows, length)
            for length in self.lengths
            for rows in range(1, self.rows(max_texts) + 1)
            if rows == self.rows(rows) and (rows == 1 or rows * length <= max_tokens)
        ]


def _steps(max_tokens: int) -> Iterator[int]:
    """Lengths below `max_tokens`."""
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
