"""L1: a bounded cache with expiry that knows how many bytes it holds. Synchronous; standard library only.

Which value goes is decided as LRU's usual approximation does (second chance, also called CLOCK: Corbató 1968): values
stand in a queue, and one that has been asked for since it was last at the head goes to the tail once more. A hit then
only marks its value, instead of moving it within a list that lies all over memory; and a job that asks for each of its
texts once pushes out its own, not those that people ask for again.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

MAX_CHANCES = 256
"""The most values passed over in search of one to evict. If all are in use, the next one goes all the same. The search
takes 20 microseconds at most."""

_OVER = 0.0  # `fresh_until` of a value that has been found expired, and counted


class Cached(Protocol):
    """A value, which keeps the notes of the cache itself: that saves two objects a value."""

    fresh_until: float
    used: bool

    def size_bytes(self) -> int: ...


V = TypeVar("V", bound=Cached)


class LRU(Generic[V]):
    """At most `max_entries` values. 0 entries: stores nothing.

    `evictions` counts values pushed out by newer ones, `expired` values found past their time: these are never given
    out, and keep their place until they are stored anew or their turn comes.
    """

    def __init__(self, *, max_entries: int, clock: Callable[[], float] = time.time) -> None:
        self.max_entries = max_entries
        self.bytes = 0
        self.evictions = 0
        self.expired = 0
        self._clock = clock
        self._tidy_every = max(1, max_entries // 2)
        self._items: dict[Hashable, V] = {}
        self._queue: deque[Hashable] = deque()  # the same keys; its own, since the head of a dict is O(n) to find

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return f"<LRU {len(self)}/{self.max_entries} entries, {self.bytes} bytes>"

    def get(self, key: Hashable) -> V | None:
        """The value, now in use; None if there is none or its time is over."""
        value = self._items.get(key)
        if value is None:
            return None
        if value.fresh_until <= self._clock():
            self._expire(value)
            return None
        value.used = True
        return value

    def get_all(self, keys: Iterable[Hashable]) -> list[V] | None:
        """The values of all keys, now in use; None as soon as one is missing or its time is over."""
        now = self._clock()
        find = self._items.get
        values = []
        for key in keys:
            value = find(key)
            if value is None or value.fresh_until <= now:
                return None
            value.used = True
            values.append(value)
        return values

    def put(self, key: Hashable, value: V, *, expires_at: float) -> None:
        """Stores `value` until `expires_at` (seconds of the clock), replacing what was there."""
        old = self._items.get(key)
        if self.max_entries <= 0 or expires_at <= self._clock():
            if old is not None:
                self._expire(old)
            return
        value.fresh_until = expires_at
        if old is not None:
            self.bytes -= old.size_bytes()
        else:
            if len(self._items) >= self.max_entries:
                self._evict()
            self._queue.append(key)
        self._items[key] = value
        self.bytes += value.size_bytes()

    def clear(self) -> int:
        """Drops everything; returns how many values that were."""
        count = len(self._items)
        self._items.clear()
        self._queue.clear()
        self.bytes = 0
        return count

    def _expire(self, value: V) -> None:
        if value.fresh_until != _OVER:
            value.fresh_until = _OVER
            self.expired += 1

    def _evict(self) -> None:
        now = self._clock()
        for _ in range(MAX_CHANCES):
            value = self._items[self._queue[0]]
            if not value.used or value.fresh_until <= now:
                break
            value.used = False
            self._queue.rotate(-1)
        self.bytes -= self._items.pop(self._queue.popleft()).size_bytes()
        self.evictions += 1
        if self.evictions % self._tidy_every == 0:
            # a dict that runs out of slots, most of them deleted, makes itself twice as large as it needs to be
            self._items = dict(self._items)
