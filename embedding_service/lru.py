"""L1: a bounded LRU with expiry that knows the bytes it holds. Synchronous; standard library only."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

V = TypeVar("V")


class LRU(Generic[V]):
    """At most `max_entries` values; the one unused for longest goes first. 0 entries: stores nothing.

    `evictions` counts values pushed out by newer ones, `expired` values found past their time.
    """

    def __init__(
        self, *, max_entries: int, size_of: Callable[[V], int], clock: Callable[[], float] = time.time
    ) -> None:
        self.max_entries = max_entries
        self.bytes = 0
        self.evictions = 0
        self.expired = 0
        self._size_of = size_of
        self._clock = clock
        # OrderedDict, not dict: finding the oldest key of a dict whose head is full of deleted slots is O(n)
        self._items: OrderedDict[Hashable, tuple[float, V]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return f"<LRU {len(self)}/{self.max_entries} entries, {self.bytes} bytes>"

    def get(self, key: Hashable) -> V | None:
        """The value, now the most recently used; None if there is none or its time is over."""
        item = self._items.get(key)
        if item is None:
            return None
        expires_at, value = item
        if expires_at <= self._clock():
            self._remove(key)
            self.expired += 1
            return None
        self._items.move_to_end(key)
        return value

    def get_all(self, keys: Iterable[Hashable]) -> list[V] | None:
        """The values of all keys, each now recently used; None as soon as one is missing or its time is over."""
        now = self._clock()
        items, touch = self._items, self._items.move_to_end
        values = []
        for key in keys:
            item = items.get(key)
            if item is None or item[0] <= now:
                return None
            touch(key)
            values.append(item[1])
        return values

    def put(self, key: Hashable, value: V, *, expires_at: float) -> None:
        """Stores `value` until `expires_at` (seconds of the clock), replacing what was there."""
        if key in self._items:
            self._remove(key)
        if self.max_entries <= 0 or expires_at <= self._clock():
            return
        if len(self._items) >= self.max_entries:
            self._remove(next(iter(self._items)))
            self.evictions += 1
        self._items[key] = (expires_at, value)
        self.bytes += self._size_of(value)

    def clear(self) -> int:
        """Drops everything; returns how many values that were."""
        count = len(self._items)
        self._items.clear()
        self.bytes = 0
        return count

    def _remove(self, key: Hashable) -> None:
        _, value = self._items.pop(key)
        self.bytes -= self._size_of(value)
