from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from embedding_service.lru import LRU


@dataclass
class Clock:
    now: float = 0.0
    cache: LRU[bytes] = field(init=False)

    def lru(self, entries: int) -> LRU[bytes]:
        return LRU(max_entries=entries, size_of=len, clock=lambda: self.now)


def test_the_least_recently_used_value_goes_first() -> None:
    cache = Clock().lru(2)
    cache.put("a", b"1", expires_at=9)
    cache.put("b", b"2", expires_at=9)
    assert cache.get("a") == b"1"
    cache.put("c", b"3", expires_at=9)
    assert [cache.get(key) for key in "abc"] == [b"1", None, b"3"]
    assert cache.evictions == 1


def test_a_value_is_gone_when_its_time_is_over() -> None:
    clock = Clock()
    cache = clock.lru(2)
    cache.put("a", b"1", expires_at=5)
    clock.now = 4.9
    assert cache.get("a") == b"1"
    clock.now = 5.0
    assert cache.get("a") is None
    assert (len(cache), cache.bytes, cache.expired) == (0, 0, 1)


def test_a_value_that_is_over_already_is_not_stored() -> None:
    cache = Clock(now=5).lru(2)
    cache.put("a", b"1", expires_at=5)
    assert len(cache) == 0


def test_storing_again_replaces_and_does_not_evict() -> None:
    cache = Clock().lru(1)
    cache.put("a", b"1", expires_at=9)
    cache.put("a", b"333", expires_at=9)
    assert (cache.get("a"), cache.bytes, cache.evictions) == (b"333", 3, 0)


def test_a_cache_of_no_entries_stores_nothing() -> None:
    cache = Clock().lru(0)
    cache.put("a", b"1", expires_at=9)
    assert cache.get("a") is None


def test_clearing_says_how_many_and_leaves_no_bytes() -> None:
    cache = Clock().lru(5)
    for key in "abc":
        cache.put(key, b"xx", expires_at=9)
    assert cache.clear() == 3
    assert (len(cache), cache.bytes) == (0, 0)


def test_all_or_none_of_several_keys_are_found_and_found_ones_count_as_used() -> None:
    clock = Clock()
    cache = clock.lru(2)
    cache.put("a", b"1", expires_at=9)
    cache.put("b", b"2", expires_at=5)
    assert cache.get_all(["b", "a", "b"]) == [b"2", b"1", b"2"]
    assert cache.get_all(["a", "c"]) is None
    cache.put("c", b"3", expires_at=9)
    assert cache.get("b") is None, "a was used last"
    clock.now = 9.0
    assert cache.get_all(["a"]) is None


@given(
    st.integers(0, 4),
    st.lists(st.tuples(st.sampled_from("putget"), st.integers(0, 6), st.binary(max_size=5), st.integers(0, 9))),
)
def test_bounds_and_byte_counts_hold_under_any_use(entries: int, steps: list[tuple[str, int, bytes, int]]) -> None:
    clock = Clock()
    cache = clock.lru(entries)
    for what, key, value, time in steps:
        clock.now += time / 10
        if what in "put":
            cache.put(key, value, expires_at=time)
        else:
            cache.get(key)
        assert len(cache) <= entries
        assert cache.bytes == sum(len(value) for _, value in cache._items.values())
