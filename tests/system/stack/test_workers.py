"""Two gateway processes on one socket, without Redis: whatever either says or forgets holds for both."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx
import pytest
from local_stack.part import wait_until
from local_stack.stack import LocalStack

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]

WORKERS = 2
BODY = {"texts": ["one text"]}
AT_ONCE = 32  # an idle gateway gives one connection after the other to the same worker; a busy one needs both
ROUNDS = 40


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    env = {"EMBEDDING_WORKERS": str(WORKERS), "REDIS_ENABLED": "false"}
    with LocalStack(state_dir=tmp_path_factory.mktemp("workers"), replicas=1, env=env) as stack:
        stack.start()
        stack.wait_ready()
        wait_until(lambda: both_ready(stack), "both workers know the model", timeout_s=20)
        yield stack


def both_ready(stack: LocalStack) -> bool:
    with ThreadPoolExecutor(AT_ONCE) as callers:
        replies = callers.map(lambda _: httpx.get(f"{stack.url}/readyz"), range(4 * AT_ONCE))
        return {reply.status_code for reply in replies} == {200}


def misses_after_asking_both(stack: LocalStack) -> int:
    """How often the text was computed once both workers have been asked; whatever they joined or had is no miss."""

    def misses() -> int:
        return int(httpx.get(f"{stack.url}/cache/stats").json()["total"]["misses"])

    before = misses()
    for _ in range(ROUNDS):
        with ThreadPoolExecutor(AT_ONCE) as callers:
            replies = list(callers.map(lambda _: httpx.post(f"{stack.url}/embed", json=BODY), range(AT_ONCE)))
        assert {reply.status_code for reply in replies} == {200}
        if misses() - before >= WORKERS:
            break
    return misses() - before


def test_a_clear_told_to_one_worker_empties_both(stack: LocalStack) -> None:
    assert misses_after_asking_both(stack) == WORKERS
    cleared = httpx.post(f"{stack.url}/cache/clear").json()
    assert cleared["l1_cleared"] == WORKERS
    assert misses_after_asking_both(stack) == WORKERS


def test_either_worker_tells_of_both_caches(stack: LocalStack) -> None:
    httpx.post(f"{stack.url}/cache/clear")
    assert misses_after_asking_both(stack) == WORKERS
    totals = {httpx.get(f"{stack.url}/cache/stats").json()["total"]["requests"] for _ in range(20)}
    assert len(totals) == 1
