"""Random load on a replica for a long time: whether its memory stays where it is.

Texts of all lengths, one to 64 in a request, both lanes, both encodings, some abandoned half-way. Prints the resident
memory each minute and the slope of its line after the warm-up; exit code 1 above `--most-mb-per-minute`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from local_stack.stack import LocalStack  # noqa: E402 - beside this folder, not in it

if TYPE_CHECKING:
    from collections.abc import Sequence

CLIENTS = 4
SAMPLE_S = 5.0
WARM_UP_SHARE = 0.1  # of the whole, and at most ten minutes: buffers and queues reach their size
MOST_WARM_UP_S = 600.0
PATIENCE_S = 0.05  # of a caller who leaves
ABANDONED_SHARE = 0.05


class Soak:
    """Clients without pause, and a note of the replica's memory every few seconds."""

    def __init__(self, url: str, replica_pid: int | None, *, seed: int) -> None:
        self._url = url
        self._statm = Path(f"/proc/{replica_pid}/statm")
        self._random = random.Random(seed)  # noqa: S311 - a load, not a secret
        self._words = Path(__file__).with_name("corpus.txt").read_text(encoding="utf-8").split()
        self.samples: list[tuple[float, float]] = []  # seconds since the start, MB
        self.requests = self.texts = self.abandoned = 0

    async def run(self, seconds: float) -> None:
        async with aiohttp.ClientSession() as session:
            clients = [asyncio.create_task(self._client(session)) for _ in range(CLIENTS)]
            started = time.monotonic()
            while (now := time.monotonic() - started) < seconds:
                self.samples.append((now, int(self._statm.read_text().split()[1]) * 4096 / 1e6))
                if len(self.samples) % int(60 / SAMPLE_S) == 1:
                    print(f"{now / 60:5.1f} min  {self.samples[-1][1]:7.1f} MB  {self.texts:,} texts", flush=True)
                done, _ = await asyncio.wait(clients, timeout=SAMPLE_S, return_when=asyncio.FIRST_EXCEPTION)
                for client in done:
                    client.result()
            for client in clients:
                client.cancel()
            await asyncio.gather(*clients, return_exceptions=True)

    async def _client(self, session: aiohttp.ClientSession) -> None:
        while True:
            texts = [self._text() for _ in range(self._random.choice((1, 1, 2, 5, 16, 64)))]
            body = json.dumps({"texts": texts, "encoding_format": self._random.choice(("float", "base64"))})
            abandon = self._random.random() < ABANDONED_SHARE
            timeout = aiohttp.ClientTimeout(total=PATIENCE_S if abandon else 60)
            try:
                async with session.post(f"{self._url}/embed", data=body, timeout=timeout) as reply:
                    await reply.read()
                    assert reply.status == 200, await reply.text()  # noqa: S101, PLR2004 - a load tool
                self.requests += 1
                self.texts += len(texts)
            except TimeoutError:
                self.abandoned += 1

    def _text(self) -> str:
        """Mostly a few dozen words, now and then more than the model reads."""
        count = min(600, int(self._random.lognormvariate(3.2, 1.0)))
        return " ".join(self._random.choices(self._words, k=count))

    def slope_mb_per_minute(self) -> float:
        """The slope of the least-squares line through what came after the warm-up."""
        last_s = self.samples[-1][0]
        since_s = min(MOST_WARM_UP_S, last_s * WARM_UP_SHARE)
        return slope([(at / 60, mb) for at, mb in self.samples if at >= since_s])


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The slope of the least-squares line through (x, y)."""
    x, y = np.array(points, dtype=float).T
    return float(np.polyfit(x, y, 1)[0])


def parse_options() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=60, help="default 60")
    options.add_argument("--most-mb-per-minute", type=float, default=1.0, help="default 1")
    options.add_argument("--seed", type=int, default=1)
    return options.parse_args()


def main() -> int:
    options = parse_options()
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as folder,
        LocalStack(state_dir=Path(folder), replicas=1) as stack,
    ):
        stack.start()
        stack.wait_ready()
        soak = Soak(stack.ml_url, stack.replicas[0].pid, seed=options.seed)
        asyncio.run(soak.run(options.minutes * 60))
    found = soak.slope_mb_per_minute()
    print(f"{soak.requests:,} requests, {soak.texts:,} texts, {soak.abandoned:,} abandoned: {found:+.3f} MB a minute")
    return 0 if found < options.most_mb_per_minute else 1


if __name__ == "__main__":
    sys.exit(main())
