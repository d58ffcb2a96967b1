"""The audit: now and then a text that a cache answered is computed again, and the two vectors are compared.

It finds entries written under a fingerprint that does not cover what changed a vector, and a replica, memory or a
library that computes wrongly. The audit works behind replies, one text at a time, and is no traffic: it counts no
outcome and stores nothing, and while jobs wait for a replica it leaves its check out.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from typing import TYPE_CHECKING

import numpy as np

from embedding_service.core.query import Outcome
from embedding_service.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from typing import Self

    from numpy.typing import NDArray

    from embedding_common.contract import Embedded
    from embedding_service.cache.entry import Entry, KeySpace
    from embedding_service.core.query import Answer
    from embedding_service.observability.metrics import Metrics

log = logging.getLogger(__name__)

DRIFT_LIMIT = 0.002
"""The largest 1 - cosine that counts as rounding. Two backends that each passed the replicas' self-test (cosine 0.9995
to the reference) are within it."""

_FROM_CACHE = (Outcome.L1, Outcome.L2)


class Audit:
    """Checks one cached text in about `one_in`. As a context manager it owns the check that runs.

    The embedder counts hits and calls `start` when the interval it drew is over.
    """

    def __init__(
        self, *, one_in: int, compute: Callable[[KeySpace, str], Awaitable[Embedded]], metrics: Metrics
    ) -> None:
        self._one_in = one_in
        self._compute = compute
        self._metrics = metrics
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<Audit of one hit in {self._one_in}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def draw_interval(self) -> int:
        """How many hits to let pass: random, so that a client's own rhythm does not always show the same text."""
        return random.randrange(1, 2 * self._one_in)  # noqa: S311 - no secret

    def start(self, space: KeySpace, texts: Sequence[str], answer: Answer) -> None:
        """Checks one of the texts of `answer` that a cache answered, unless a check still runs."""
        cached = [index for index, outcome in enumerate(answer.outcomes) if outcome in _FROM_CACHE]
        busy = self._task is not None and not self._task.done()
        if self._closed or busy or not cached:
            return
        index = random.choice(cached)  # noqa: S311 - no secret
        self._task = asyncio.create_task(self._check(space, texts[index], answer.entries[index]))

    async def _check(self, space: KeySpace, text: str, served: Entry) -> None:
        result = "skipped"
        try:
            computed = await self._compute(space, text)
            card = computed.card
            # else the replicas have moved on: nothing to compare
            if space.covers(fingerprint=card.fingerprint, prompt=card.prompt(space.prompt_name)):
                result = self._compare(space.key(text), served, computed)
        except Problem as problem:
            log.info("a check of a cached vector is left out: %s", problem.message)
        except Exception:
            log.exception("a check of a cached vector failed")
        finally:
            self._metrics.drift_checks[result].inc()

    def _compare(self, key: bytes, served: Entry, computed: Embedded) -> str:
        drift = 1 - _cosine(np.frombuffer(served.vector, "<f4"), computed.vectors[0])
        self._metrics.drift_worst.raise_to(drift)
        if drift <= DRIFT_LIMIT:
            return "same"
        log.error(
            "a cached vector is not what a replica computes: 1 - cosine is %.6f, fingerprint=%s key=%s",
            *(drift, computed.card.fingerprint, key.hex()),
        )
        return "different"


def _cosine(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """The cosine of two float32 vectors: 1 for equal ones, zero vectors included, and 0 if they cannot be compared."""
    if one.shape != other.shape:
        return 0.0
    if np.array_equal(one, other):
        return 1.0
    a, b = one.astype(np.float64), other.astype(np.float64)
    cosine = float(a @ b / max(math.sqrt((a @ a) * (b @ b)), 1e-300))
    return cosine if math.isfinite(cosine) else 0.0
