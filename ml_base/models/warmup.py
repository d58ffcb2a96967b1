"""What is done with a model before it is served: the best size of a batch is found, and every shape computed once.

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
"""The share of the best throughput that a batch must reach. A larger batch costs those who wait more than it gains."""

PROBE_LENGTHS = (16, 48, 80)
"""The tokens of a question, of a sentence or two, and of a paragraph. Fuller batches hold more of each."""
BESIDE_S = 0.0015
"""What a batch takes besides computing, in seconds: queue, hand-over between two threads, reply (measured over
HTTP)."""
ROUNDS = 5
"""How often a batch is timed. The fastest time counts: what else the machine does only ever adds to it."""
FEWEST_TOKENS = 64
MOST_TOKENS = 1 << 17

_SAMPLE = "A text to fill any length: words, figures (3.14) and marks, as people write them. "


@dataclass(frozen=True, slots=True)
class Bounds:
    """How large a batch may be: texts, and tokens with padding, where 0 stands for: find the best number.

    `max_s` is how long a batch of that number may run, and `warm_up_s` how long the warming of all shapes. `sharing` is
    how many inference threads of this machine's replicas run on one core: with three on two cores each batch lasts half
    as long again.
    """

    max_texts: int
    max_tokens: int = 0
    max_s: float = 0.06
    sharing: float = 1.0
    warm_up_s: float = 20.0


def find_batch_tokens(backend: Backend, bounds: Bounds, *, clock: Callable[[], float]) -> int:
    """Returns the fewest tokens with `ENOUGH` of the best throughput among those that run within the bound.

    `clock` is the calling thread's own processor time in seconds, or elapsed time if other threads compute for it.
    """
    rates: dict[int, float] = {}
    for tokens in _candidates():
        batches = [_batch(backend, tokens, length, bounds.max_texts) for length in PROBE_LENGTHS]
        took_s = [min(_timed(backend, rows, clock) for _ in range(ROUNDS)) for rows in batches]
        if rates and max(took_s) * bounds.sharing > bounds.max_s:
            break
        computed = sum(text.length for rows in batches for text in rows)
        rates[tokens] = computed / (sum(took_s) + len(batches) * BESIDE_S)
    found = min(tokens for tokens, rate in rates.items() if rate >= ENOUGH * max(rates.values()))
    log.info(
        "batch of %d tokens: %.0f tokens/s, best %.0f within %.0f ms, %.1f threads a core",
        *(found, rates[found], max(rates.values()), bounds.max_s * 1000, bounds.sharing),
    )
    return found


def warm(backend: Backend, bounds: Bounds, *, tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
    """Computes every shape of the backend's grid once, small ones first, for as long as `bounds` allow."""
    shapes = backend.grid.shapes(tokens, bounds.max_texts) or [(1, length) for length in PROBE_LENGTHS]
    give_up_at = clock() + bounds.warm_up_s
    left = sorted(shapes, key=lambda shape: (shape[0] * shape[1], shape))
    for done, (rows, length) in enumerate(left):
        if clock() > give_up_at:
            log.warning("%d of %d shapes are not warmed, after %.0f s", len(left) - done, len(left), bounds.warm_up_s)
            return
        backend.embed([_text(backend, length)] * rows)


def _candidates() -> Iterator[int]:
    """Yields 64, 96, 128, 192, 256, 384 ..."""
    for power in itertools.count():
        for tokens in (FEWEST_TOKENS << power, (FEWEST_TOKENS << power) * 3 // 2):
            if tokens > MOST_TOKENS:
                return
            yield tokens


def _batch(backend: Backend, tokens: int, length: int, max_texts: int) -> list[Tokenized]:
    length = min(backend.max_tokens, max(length, tokens // max_texts))
    return [_text(backend, length)] * max(1, tokens // length)


def _timed(backend: Backend, rows: list[Tokenized], clock: Callable[[], float]) -> float:
    started = clock()
    backend.embed(rows)
    return max(clock() - started, 1e-9)


def _text(backend: Backend, length: int) -> Tokenized:
    """Returns a text of so many tokens, or of as many as the model reads."""
    [sample] = backend.tokenize([_SAMPLE * (1 + length // 8)], prompt="", direction="right")
    features = {name: values[:length] for name, values in sample.features.items()}
    return Tokenized(features, length=min(length, sample.length), tokens=length, truncated=False)
