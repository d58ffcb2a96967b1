"""Redis that freezes, dies, refuses and lies. Replicas cost nothing here, so that what is added is Redis' own."""

from __future__ import annotations

import base64
import random
import signal
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from local_stack.part import wait_until
from local_stack.stack import LOOPBACK
from redis import Redis

from embedding_service.cache.entry import Entry, KeySpace, pack
from embedding_service.cache.redis.client import EPOCH_KEY, PREFIX
from embedding_service.cache.redis.store import CARDS_KEY, entry_name
from tests.system.faults.load import Load, percentile_ms
from tests.system.faults.replica import CARD, vector
from tests.system.stack.client import fresh_texts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from local_stack.stack import LocalStack

    from tests.system.stack.client import Client

short = pytest.mark.stack
pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]

FROZEN_S = 3.0
FROZEN_ADDED_P99_MS = 50
SPOILED = 100_000
INTACT = 1_000
TEXTS_IN_REQUEST = 2_000


@pytest.fixture
def redis(cheap: LocalStack) -> Iterator[Redis]:
    with Redis(host=LOOPBACK, port=cheap.ports.redis) as redis:
        yield redis


def in_use(client: Client) -> bool:
    return bool(client.cache_stats()["l2"]["connected"])


def rows(client: Client, texts: Sequence[str]) -> tuple[list[np.ndarray], int]:
    """The vectors as they are kept, and how many of them were cached."""
    reply = client.embed(texts, normalize=False, encoding_format="base64").json()
    vectors = [np.frombuffer(base64.b64decode(each), "<f4") for each in reply["embeddings"]]
    return vectors, reply["cached_count"]


def wrong(client: Client, texts: Sequence[str]) -> int:
    vectors, _ = rows(client, texts)
    return sum(not np.array_equal(row, vector(text)) for row, text in zip(vectors, texts, strict=True))


@short
def test_a_frozen_redis(cheap: LocalStack, cheap_client: Client, figures: Callable[..., None]) -> None:
    wait_until(lambda: in_use(cheap_client), "Redis is in use", timeout_s=10)
    with Load(cheap.url) as load:
        wait_until(lambda: len(load) > 1500, "load is on", timeout_s=60)
        frozen_at = time.monotonic()
        usual_ms = percentile_ms(load.samples[200:], 99)
        cheap.redis.send(signal.SIGSTOP)
        time.sleep(FROZEN_S)
        thawed_at = time.monotonic()
        cheap.redis.send(signal.SIGCONT)
        wait_until(lambda: in_use(cheap_client), "Redis is in use again", timeout_s=10)
    during = load.during(frozen_at, thawed_at)
    added_ms = percentile_ms(during, 99) - usual_ms
    figures(
        "SIGSTOP of Redis",
        requests=len(load),
        failed=load.failed,
        usual_p99=f"{usual_ms:.0f} ms",
        added_p99=f"{added_ms:.0f} ms",
        slowest=f"{percentile_ms(during, 100):.0f} ms",
    )
    assert load.failed == 0, load.statuses
    assert added_ms <= FROZEN_ADDED_P99_MS


@short
def test_a_killed_redis(cheap: LocalStack, cheap_client: Client, figures: Callable[..., None]) -> None:
    with Load(cheap.url) as load:
        wait_until(lambda: len(load) > 300, "load is on", timeout_s=60)
        cheap.redis.send(signal.SIGKILL)
        wait_until(lambda: not in_use(cheap_client), "the gateway has noticed", timeout_s=10, every_s=0.02)
        wait_until(lambda: in_use(cheap_client), "Redis is in use again", timeout_s=20)
    figures("kill -9 of Redis", requests=len(load), failed=load.failed)
    assert load.failed == 0, load.statuses


def _full(redis: Redis) -> None:
    redis.config_set("maxmemory-policy", "noeviction")
    redis.config_set("maxmemory", "1")


def _roomy(redis: Redis) -> None:
    redis.config_set("maxmemory", "500mb")
    redis.config_set("maxmemory-policy", "allkeys-lru")


def _slow(redis: Redis) -> None:
    for _ in range(10):
        redis.execute_command("CLIENT", "PAUSE", "120", "ALL")
        time.sleep(0.2)


def _locked(redis: Redis) -> None:
    redis.config_set("requirepass", "a password the gateway does not have")
    redis.client_kill_filter(_type="normal", skipme=True)


def _open(redis: Redis) -> None:
    redis.config_set("requirepass", "")


def _read_only(redis: Redis) -> None:
    redis.replicaof(LOOPBACK, "1")


def _writable(redis: Redis) -> None:
    redis.replicaof("NO", "ONE")


def _foreign(redis: Redis) -> None:
    """Other bytes, and other types, wherever we keep something."""
    redis.set(EPOCH_KEY, "9" * 30)
    redis.delete(CARDS_KEY)
    redis.set(CARDS_KEY, b"\xff\x00 no cards")
    for number, name in enumerate(redis.scan_iter(match=PREFIX + b"entry:*", count=1000)):
        redis.delete(name)
        if number % 2:
            redis.rpush(name, "a list")
        else:
            redis.set(name, b"foreign")


def _swapped(redis: Redis) -> None:
    """Each entry under another text's key."""
    names = sorted(redis.scan_iter(match=PREFIX + b"entry:*", count=1000))
    kept = [(name, value) for name, value in zip(names, redis.mget(names), strict=True) if value is not None]
    redis.mset({name: value for (name, _), (_, value) in zip(kept, kept[1:] + kept[:1], strict=True)})


def _nothing(_: Redis) -> None:
    pass


@pytest.mark.parametrize(
    ("harm", "heal"),
    [
        pytest.param(_full, _roomy, id="out of memory"),
        pytest.param(lambda redis: redis.flushall(), _nothing, id="flushed"),
        pytest.param(_read_only, _writable, id="read-only"),
        pytest.param(_slow, _nothing, id="slow"),
        pytest.param(_locked, _open, id="asking for a password"),
        pytest.param(_foreign, lambda redis: redis.delete(CARDS_KEY), id="with foreign bytes"),
        pytest.param(_swapped, _nothing, id="with swapped entries"),
    ],
)
def test_a_harmed_redis(
    cheap: LocalStack,
    cheap_client: Client,
    redis: Redis,
    figures: Callable[..., None],
    request: pytest.FixtureRequest,
    harm: Callable[[Redis], None],
    heal: Callable[[Redis], None],
) -> None:
    wait_until(lambda: in_use(cheap_client), "Redis is in use", timeout_s=10)
    known = fresh_texts(200)
    rows(cheap_client, known)
    wait_until(lambda: redis.dbsize() >= len(known), "they are kept", timeout_s=5)
    cheap.gateway.stop()  # what is in L1 would hide what Redis says
    cheap.gateway.start()
    cheap.gateway.wait_ready()
    try:
        with Load(cheap.url, callers=4) as load:
            wait_until(lambda: len(load) > 50, "load is on", timeout_s=60)
            harm(redis)
            errors = wrong(cheap_client, known)
            before = len(load)
            wait_until(lambda: len(load) > before + 300, "load goes on", timeout_s=60)
    finally:
        heal(redis)
    began = time.monotonic()
    wait_until(lambda: is_kept(cheap_client, redis), "new texts are kept again", timeout_s=20)
    figures(
        f"Redis {request.node.callspec.id}",
        requests=len(load),
        failed=load.failed,
        wrong_vectors=errors,
        in_use_again_after=f"{time.monotonic() - began:.1f} s",
    )
    assert load.failed == 0, load.statuses
    assert errors == 0


def is_kept(client: Client, redis: Redis) -> bool:
    """Whether a new text finds its way into Redis within a moment."""
    [text] = fresh_texts(1)
    rows(client, [text])
    time.sleep(0.2)
    key = space().key(text)
    epoch = int(redis.get(EPOCH_KEY) or 0)
    return bool(redis.exists(entry_name(epoch, key)))


def space() -> KeySpace:
    return KeySpace(model_id=CARD.id, fingerprint=CARD.fingerprint, prompt_name=None, prompt="", direction="right")


def spoiled(stored: bytes, dice: random.Random) -> bytes:
    """One to eight bytes changed, anywhere."""
    changed = bytearray(stored)
    for place in dice.sample(range(len(stored)), dice.randint(1, 8)):
        changed[place] ^= dice.randint(1, 255)
    return bytes(changed)


def keep(redis: Redis, texts: Sequence[str], stored_as: Callable[[bytes], bytes]) -> None:
    """Entries as the gateway would write them, each passed through `stored_as`."""
    epoch = int(redis.get(EPOCH_KEY) or 0)
    expires_at = time.time() + 3600
    for start in range(0, len(texts), 1000):
        part = texts[start : start + 1000]
        packed = zip(space().keys(part), part, strict=True)
        pairs = {
            entry_name(epoch, key): pack(key, Entry(vector(text).tobytes(), 5, False, expires_at))
            for key, text in packed
        }
        redis.mset({name: stored_as(value) for name, value in pairs.items()})


def test_flipped_bytes(cheap: LocalStack, cheap_client: Client, redis: Redis, figures: Callable[..., None]) -> None:
    wait_until(lambda: in_use(cheap_client), "Redis is in use", timeout_s=10)
    dice = random.Random(5)
    intact, texts = fresh_texts(INTACT), fresh_texts(SPOILED)
    keep(redis, intact, lambda stored: stored)
    keep(redis, texts, lambda stored: spoiled(stored, dice))
    _, cached = rows(cheap_client, intact)
    assert cached == INTACT  # so that the others were read and refused, not overlooked
    served_wrong = served_cached = 0
    for start in range(0, SPOILED, TEXTS_IN_REQUEST):
        part = texts[start : start + TEXTS_IN_REQUEST]
        vectors, cached = rows(cheap_client, part)
        served_cached += cached
        served_wrong += sum(not np.array_equal(row, vector(text)) for row, text in zip(vectors, part, strict=True))
    figures("random bytes flipped in Redis", entries=f"{SPOILED:,}", served=served_cached, wrong_vectors=served_wrong)
    assert served_wrong == 0
    assert served_cached == 0
