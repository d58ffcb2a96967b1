"""One replica of three answers, but badly. What it says must never become a vector.

Its health is good, so it stays in service: calls that it spoils are repeated as far as the retry budget goes, and the
rest are refused.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import httpx
import numpy as np
import pytest
from local_part import wait_until
from local_stack import LOOPBACK

from tests.faults.load import Load, percentile_ms
from tests.faults.replica import OTHER, vector
from tests.stack.client import fresh_texts

if TYPE_CHECKING:
    from collections.abc import Callable

    from local_stack import LocalStack

    from tests.stack.client import Client

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]

TOLD_S = 2.0


def tell(stack: LocalStack, number: int, manner: str) -> None:
    url = f"http://{LOOPBACK}:{stack.ports.first_replica + number}/behave"
    httpx.post(url, json={"as": manner}).raise_for_status()


def wrong(client: Client) -> int:
    """Of texts that are now in the cache or computed, those with a vector that no healthy replica would give."""
    texts = fresh_texts(200)
    found = 0
    for start in range(0, len(texts), 4):
        part = texts[start : start + 4]
        reply = client.embed(part, normalize=False)
        if reply.status_code == 200:
            rows = np.array(reply.json()["embeddings"], np.float32)
            found += sum(not np.array_equal(row, vector(text)) for row, text in zip(rows, part, strict=True))
    return found


@pytest.mark.parametrize("manner", ["slow", "garbage", "surplus", "cut", "error"])
def test_a_replica_that_answers_badly(
    cheap: LocalStack, cheap_client: Client, figures: Callable[..., None], manner: str
) -> None:
    try:
        with Load(cheap.url, callers=4, every_s=0.02) as load:
            wait_until(lambda: len(load) > 100, "load is on", timeout_s=60)
            tell(cheap, 0, manner)
            errors = wrong(cheap_client)
            time.sleep(TOLD_S)
    finally:
        tell(cheap, 0, "well")
    figures(
        f"one replica of three: {manner}",
        requests=len(load),
        failed=load.failed,
        wrong_vectors=errors,
        p99=f"{percentile_ms(load.samples, 99):.0f} ms",
    )
    assert errors == 0
    assert set(load.statuses) <= {200, 500, 503}
    assert load.statuses[200] > load.failed


def test_replicas_of_two_fingerprints_are_never_mixed_in_one_reply(
    cheap: LocalStack, cheap_client: Client, figures: Callable[..., None]
) -> None:
    tell(cheap, 0, "other")
    mixed = answered = 0
    try:
        for _ in range(60):
            texts = fresh_texts(40)  # several pieces, over all replicas
            reply = cheap_client.embed(texts, normalize=False)
            assert reply.status_code in (200, 503)
            if reply.status_code == 200:
                answered += 1
                rows = np.array(reply.json()["embeddings"], np.float32)
                ours = [np.array_equal(row, vector(text)) for row, text in zip(rows, texts, strict=True)]
                theirs = [np.array_equal(row, vector(text, OTHER)) for row, text in zip(rows, texts, strict=True)]
                mixed += not (all(ours) or all(theirs))
    finally:
        tell(cheap, 0, "well")
    figures("one replica of three: another fingerprint", requests=60, answered=answered, mixed=mixed)
    assert mixed == 0
    wait_until(lambda: cheap_client.embed(fresh_texts(1)).status_code == 200, "one model is left", timeout_s=10)
