"""One replica of three answers, but badly. What it says must never become a vector.

Its health is good, so HAProxy keeps it: the gateway repeats what it spoils on another, and soon names others only.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import httpx
import numpy as np
import pytest
from local_stack.part import wait_until
from local_stack.stack import LOOPBACK

from tests.system.faults.load import Load, percentile_ms
from tests.system.faults.replica import OTHER, vector
from tests.system.stack.client import fresh_texts

if TYPE_CHECKING:
    from collections.abc import Callable

    from local_stack.stack import LocalStack

    from tests.system.stack.client import Client

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]

LIES_S = 5.0
MOST_GIVEN = 40
"""Of some hundred calls: those that it spoils before it is ejected, those in hand then, and a try now and then."""
BACK_WITHIN_S = 20.0  # if a call that names nobody, one in 5 s, finds another well replica first, a few times


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


def test_a_slow_replica_fails_no_request(cheap: LocalStack, cheap_client: Client, figures: Callable[..., None]) -> None:
    try:
        with Load(cheap.url, callers=4, every_s=0.02) as load:
            wait_until(lambda: len(load) > 100, "load is on", timeout_s=60)
            tell(cheap, 0, "slow")
            errors = wrong(cheap_client)
    finally:
        tell(cheap, 0, "well")
    figures(
        "one replica of three: slow",
        requests=len(load),
        failed=load.failed,
        wrong_vectors=errors,
        p99=f"{percentile_ms(load.samples, 99):.0f} ms",
    )
    assert load.failed == errors == 0


@pytest.mark.parametrize("manner", ["garbage", "surplus", "nan", "cut", "error"])
def test_a_replica_that_lies_is_avoided_until_it_answers_well(
    cheap: LocalStack, cheap_client: Client, figures: Callable[..., None], manner: str
) -> None:
    liar = cheap.replicas[0].name
    try:
        with Load(cheap.url, callers=4, every_s=0.02) as load:
            wait_until(lambda: len(load) > 100, "load is on", timeout_s=60)
            before, sent = cheap.given()[liar], len(load)
            tell(cheap, 0, manner)
            errors = wrong(cheap_client)
            time.sleep(LIES_S)
            given, sent = cheap.given()[liar] - before, len(load) - sent
            tell(cheap, 0, "well")
            well_at = time.monotonic()
            before = cheap.given()[liar]
            wait_until(lambda: cheap.given()[liar] > before + 50, "it takes part again", timeout_s=BACK_WITHIN_S)
            back_s = time.monotonic() - well_at
    finally:
        tell(cheap, 0, "well")
    figures(
        f"one replica of three: {manner}",
        requests=len(load),
        failed=load.failed,
        wrong_vectors=errors,
        given_to_it=f"{given} of {sent}",
        takes_part_after=f"{back_s:.1f} s",
        p99=f"{percentile_ms(load.samples, 99):.0f} ms",
    )
    assert errors == 0
    assert load.failed == 0, load.statuses
    assert given <= MOST_GIVEN


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
