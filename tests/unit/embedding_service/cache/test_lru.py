from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from embedding_service.cache.lru import LRU, MAX_CHANCES


@dataclass
class Value:
    text: str
    fresh_until: float = 0.0
    used: bool = False

    def size_bytes(self) -> int:
        return len(self.text)


@dataclass
class Clock:
    now: float = 0.0
    cache: LRU[Value] = field(init=False)

    def lru(self, entries: int) -> LRU[Value]:
        self.cache = LRU(max_entries=entries, clock=lambda: self.now)
        return self.cache

    def put(self, *keys: str, expires_at: float = 9) -> None:
        for key in keys:
            self.cache.put(key, Value(f"of {key}"), expires_at=expires_at)

    def get(self, *keys: str) -> list[str | None]:
        values = [self.cache.get(key) for key in keys]
        return [None if value is None else value.text for value in values]


def test_the_value_unused_for_longest_goes_first() -> None:
    clock = Clock()
    cache = clock.lru(2)
    clock.put("a", "b")
    assert clock.get("a") == ["of a"]
    clock.put("c")
    assert clock.get("a", "b", "c") == ["of a", None, "of c"]
    assert cache.evictions == 1


def test_a_job_over_many_texts_does_not_push_out_what_people_ask_for_again() -> None:
    clock = Clock()
    clock.lru(100)
    asked = [f"question {number}" for number in range(20)]
    clock.put(*asked)
    for start in range(0, 2_000, 50):
        assert None not in clock.get(*asked)
        clock.put(*(f"document {number}" for number in range(start, start + 50)))


def test_a_new_value_finds_room_at_once_though_all_are_in_use() -> None:
    clock = Clock()
    cache = clock.lru(10 * MAX_CHANCES)
    clock.put(*map(str, range(cache.max_entries)))
    clock.get(*map(str, range(cache.max_entries)))
    clock.put("new")
    assert len(cache) == cache.max_entries
    assert clock.get("new", str(MAX_CHANCES), str(MAX_CHANCES + 1)) == ["of new", None, f"of {MAX_CHANCES + 1}"]


def test_a_value_is_not_given_out_when_its_time_is_over() -> None:
    clock = Clock()
    cache = clock.lru(2)
    clock.put("a", expires_at=5)
    clock.now = 4.9
    assert clock.get("a") == ["of a"]
    clock.now = 5.0
    assert clock.get("a", "a") == [None, None]
    assert cache.expired == 1, "counted once, however often it is asked for"


def test_a_value_past_its_time_gives_way_though_it_was_in_use() -> None:
    clock = Clock()
    clock.lru(2)
    clock.put("a", expires_at=5)
    clock.put("b")
    clock.get("a", "b")
    clock.now = 5.0
    clock.put("c")
    assert clock.get("b", "c") == ["of b", "of c"]


def test_a_value_that_is_over_already_is_not_stored_and_ends_what_it_replaces() -> None:
    clock = Clock(now=5)
    cache = clock.lru(2)
    clock.put("a", expires_at=5)
    assert len(cache) == 0
    clock.put("a", expires_at=9)
    clock.put("a", expires_at=5)
    assert clock.get("a") == [None]


def test_storing_again_replaces_and_does_not_evict() -> None:
    clock = Clock()
    cache = clock.lru(1)
    cache.put("a", Value("1"), expires_at=9)
    cache.put("a", Value("333"), expires_at=9)
    assert (clock.get("a"), cache.bytes, cache.evictions) == (["333"], 3, 0)


def test_a_cache_of_no_entries_stores_nothing() -> None:
    clock = Clock()
    clock.lru(0)
    clock.put("a")
    assert clock.get("a") == [None]


def test_clearing_says_how_many_and_leaves_no_bytes() -> None:
    clock = Clock()
    cache = clock.lru(3)
    clock.put("a", "b", "c")
    assert cache.clear() == 3
    assert (len(cache), cache.bytes) == (0, 0)
    clock.put("d", "e", "f", "g")
    assert len(cache) == 3


def test_all_or_none_of_several_keys_are_found_and_found_ones_count_as_used() -> None:
    clock = Clock()
    cache = clock.lru(3)
    clock.put("x", "a", "b")
    found = cache.get_all(["b", "a", "b"])
    assert found is not None
    assert [value.text for value in found] == ["of b", "of a", "of b"]
    assert cache.get_all(["a", "c"]) is None
    clock.put("c")
    assert clock.get("x", "a", "b") == [None, "of a", "of b"]
    clock.now = 9.0
    assert cache.get_all(["a"]) is None


@given(
    st.integers(0, 4),
    st.lists(st.tuples(st.sampled_from(["put", "get", "clear"]), st.integers(0, 6), st.text(), st.integers(0, 9))),
)
def test_bounds_and_byte_counts_hold_under_any_use(entries: int, steps: list[tuple[str, int, str, int]]) -> None:
    clock = Clock()
    cache = clock.lru(entries)
    for what, key, text, time in steps:
        clock.now += time / 10
        if what == "put":
            cache.put(key, Value(text), expires_at=time)
        elif what == "get":
            value = cache.get(key)
            assert value is None or value.fresh_until > clock.now
        elif key == 0:
            cache.clear()
        assert len(cache) <= entries
        assert cache.bytes == sum(value.size_bytes() for value in cache._items.values())
        assert sorted(cache._queue) == sorted(cache._items)  # type: ignore[type-var]  # the keys here are numbers
