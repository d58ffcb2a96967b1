"""Load on a stack while something goes wrong with it, and what became of every request."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import aiohttp
import orjson

from tests.system.stack.client import fresh_texts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

PATIENCE_S = 60.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: when it was sent (monotonic clock), how long it took, its status, or the error's name instead."""

    sent_at: float
    took_s: float
    status: int | str

    @property
    def over_at(self) -> float:
        return self.sent_at + self.took_s


def fresh(texts: int) -> Callable[[], dict[str, Any]]:
    """Requests that nobody has sent before."""
    return lambda: {"texts": fresh_texts(texts)}


def percentile_ms(samples: Iterable[Sample], percent: float) -> float:
    took = sorted(sample.took_s for sample in samples)
    return 1000 * took[min(len(took) - 1, int(len(took) * percent / 100))]


class Load:
    """`callers` that each send one request after the other as long as the block lasts, every `every_s` at most.

    Runs in a thread of its own with one event loop: a request costs the shared machine as little as can be.
    """

    def __init__(
        self,
        url: str,
        *,
        callers: int = 6,
        make: Callable[[], Mapping[str, Any]] | None = None,
        headers: Mapping[str, str] | None = None,
        every_s: float = 0.0,
    ) -> None:
        self.samples: list[Sample] = []
        self._url = f"{url}/embed"
        self._callers = callers
        self._make = make or fresh(1)
        self._headers = {"content-type": "application/json", **(headers or {})}
        self._every_s = every_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="load")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def statuses(self) -> Counter[int | str]:
        return Counter(sample.status for sample in list(self.samples))

    @property
    def failed(self) -> int:
        return sum(sample.status != 200 for sample in list(self.samples))

    def during(self, since: float, until: float) -> list[Sample]:
        """Requests that were under way at some moment between two times of the monotonic clock."""
        return [sample for sample in list(self.samples) if sample.sent_at < until and sample.over_at > since]

    async def _run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
            await asyncio.gather(*(self._call(session) for _ in range(self._callers)))

    async def _call(self, session: aiohttp.ClientSession) -> None:
        while not self._over.is_set():
            sent_at = time.monotonic()
            status: int | str
            try:
                async with session.post(self._url, data=orjson.dumps(self._make()), headers=self._headers) as reply:
                    await reply.read()
                    status = reply.status
            except (aiohttp.ClientError, OSError, TimeoutError) as problem:
                status = repr(problem)
            self.samples.append(Sample(sent_at, time.monotonic() - sent_at, status))
            if self._every_s:
                with contextlib.suppress(ValueError):
                    await asyncio.sleep(sent_at + self._every_s - time.monotonic())
