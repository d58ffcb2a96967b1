"""What a model is put through before it is served: how much to compute in one go, and every shape once.

Everything here runs in the thread that loads, on made-up texts of exact length.
"""

from __future__ import annotations

import itertools
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ml_base.backends import Tokenized

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ml_base.backends import Backend

log = logging.getLogger(__name__)

ENOUGH = 0.9
"""Of the best throughput. What lies beyond costs those who wait more than it gains."""

PROBE_LENGTHS = (16, 48, 80)  # tokens of a question, a sentence or two, a paragraph; fuller slices hold more of each
BESIDE_S = 0.0015  # of a slice, besides computing it: queue, two threads' hand-over, reply (measured over HTTP)
ROUNDS = 5  # of which the fastest counts: whatever else the machine does only ever adds
FEWEST_TOKENS = 64
MOST_TOKENS = 1 << 17

_SAMPLE = "A text to fill any length: words, figures (3.14) and marks, as people write them. "


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a slice may be: texts, tokens with padding (0: find out), and how long it may run when it is found.

    `sharing` is how many inference threads of this machine's replicas run on one core: with three on two cores each
    slice lasts half as long again.
    """

    max_texts: int
    max_tokens: int = 0
    max_s: float = 0.06
    sharing: float = 1.0
    warm_up_s: float = 20.0


def find_slice(backend: Backend, bounds: Bounds, *, clock: Callable[[], float]) -> int:
    """The fewest tokens with `ENOUGH` of the best throughput among those that run within the bound.

    `clock` counts what the calling thread was given, or the time of day where others compute for it.
    """
    rates: dict[int, float] = {}
    for tokens in _candidates():
        slices = [_slice(backend, tokens, length, bounds.max_texts) for length in PROBE_LENGTHS]
        took_s = [min(_timed(backend, rows, clock) for _ in range(ROUNDS)) for rows in slices]
        if rates and max(took_s) * bounds.sharing > bounds.max_s:
            break
        computed = sum(len(text) for rows in slices for text in rows)
        rates[tokens] = computed / (sum(took_s) + len(slices) * BESIDE_S)
    found = min(tokens for tokens, rate in rates.items() if rate >= ENOUGH * max(rates.values()))
    log.info(
        "slice of %d tokens: %.0f tokens/s, best %.0f within %.0f ms, %.1f threads a core",
        *(found, rates[found], max(rates.values()), bounds.max_s * 1000, bounds.sharing),
    )
    return found


def warm(backend: Backend, bounds: Bounds, *, tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
    """Computes every shape of the backend's grid once, small ones first, for as long as `bounds` allow."""
    shapes = backend.grid.shapes(tokens, bounds.max_texts) or [(1, length) for length in PROBE_LENGTHS]
    give_up_at = clock() + bounds.warm_up_s
    left = sorted(shapes, key=lambda shape: (shape[0] * shape[1], shape))
    for place, (rows, length) in enumerate(left):
        if clock() > give_up_at:
            log.warning("%d of %d shapes are not warmed, after %.0f s", len(left) - place, len(left), bounds.warm_up_s)
            return
        backend.embed([_text(backend, length)] * rows)


def _candidates() -> Iterator[int]:
    """64, 96, 128, 192, 256, 384 ..."""
    for power in itertools.count():
        for tokens in (FEWEST_TOKENS << power, (FEWEST_TOKENS << power) * 3 // 2):
            if tokens > MOST_TOKENS:
                return
            yield tokens


def _slice(backend: Backend, tokens: int, length: int, max_texts: int) -> list[Tokenized]:
    length = min(backend.max_tokens, max(length, tokens // max_texts))
    return [_text(backend, length)] * max(1, tokens // length)


def _timed(backend: Backend, rows: list[Tokenized], clock: Callable[[], float]) -> float:
    started = clock()
    backend.embed(rows)
    return max(clock() - started, 1e-9)


def _text(backend: Backend, length: int) -> Tokenized:
    """A text of that many tokens, or of as many as the model reads."""
    [sample] = backend.tokenize([_SAMPLE * (1 + length // 8)], prompt="", direction="right")
    features = {name: values[:length] for name, values in sample.features.items()}
    return Tokenized(features, tokens=length, truncated=False)
