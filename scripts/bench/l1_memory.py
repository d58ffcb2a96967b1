#!/usr/bin/env python3
"""What an L1 entry really costs: growth of this process by `--entries` vectors, beside the bytes that L1 reports.

Each entry is made as the gateway makes it: a key of its own, a vector cut from a reply's array, its own numbers.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from pathlib import Path

import numpy as np

from embedding_service.cache.entry import Entry, KeySpace
from embedding_service.cache.lru import LRU


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def fill(l1: LRU[Entry], entries: int, dimension: int) -> None:
    space = KeySpace(model_id="m", fingerprint="f", prompt_name=None, prompt="", direction="right")
    row = np.ones(dimension, np.float32)
    for number in range(entries):
        now = time.time()
        entry = Entry(row.tobytes(), 300 + number % 700, truncated=False, expires_at=now + 3600)
        l1.put(
            space.name(f"text {number}: how long does it take to fetch a vector from a cache"),
            entry,
            expires_at=now + 60,
        )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--entries", type=int, default=50_000)
    options.add_argument("--dimension", type=int, default=384)
    args = options.parse_args()
    l1 = LRU[Entry](max_entries=args.entries)
    gc.collect()
    before = resident_bytes()
    fill(l1, args.entries, args.dimension)
    grown = resident_bytes() - before
    print(f"{args.entries} entries of {args.dimension} dimensions")
    print(f"  vectors alone   {args.entries * args.dimension * 4 / 1e6:8.1f} MB")
    print(f"  resident growth {grown / 1e6:8.1f} MB   {grown / args.entries:7.0f} bytes an entry")
    print(f"  L1 reports      {l1.bytes / 1e6:8.1f} MB   ratio to growth {l1.bytes / grown:.2f}")


if __name__ == "__main__":
    main()
