"""Outlier ejection: which replicas are left out, because what they answer cannot be used.

HAProxy gives the next request to the replica that has the least in hand. A replica that answers nonsense at once has
nothing in hand, so it would draw most calls, with a health that is good. Only the gateway reads replies. It learns the
names of the replicas from them, and ejects one that sends nothing usable several times in a row. While any replica is
ejected, each call names a good one; else HAProxy chooses. From time to time one call tries an ejected replica, and one
call names none: HAProxy then prefers replicas that had no calls lately, and so shows those that have come meanwhile.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

EJECT_AFTER = 3  # unusable replies in a row: one or two may be an accident, and each costs no more than a repetition
FIRST_PAUSE_S = 1.0  # before an ejected replica is tried again; twice as long each time
MAX_PAUSE_S = 30.0  # at the latest: a try costs one repetition. Calls that name no replica may reach it sooner
LOOK_AROUND_S = 5.0  # between calls that name no replica while others do


@dataclass(slots=True)
class _Replica:
    name: str
    unusable: int = 0  # replies in a row
    calls: int = 0  # in hand that name it
    chosen_last: int = 0  # the number of the choice that fell on it
    pause_s: float = 0.0  # the last one
    back_at: float = float("-inf")  # when it was last let in again


class Ejections:
    """The replicas known by name, and which of them are ejected. Never all of them: the last good one stays.

    Callers read `ejected` and `in_good_standing` before they call, since a healthy call needs neither.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._replicas: dict[str, _Replica] = {}
        self.ejected: dict[str, float] = {}  # name -> when it may be tried again
        self.in_good_standing: set[str] = set()  # names that have answered well last, so `usable` changes nothing
        self._look_around_at = 0.0
        self._choices = 0

    def __repr__(self) -> str:
        return f"<Ejections of {sorted(self._replicas)}: {sorted(self.ejected)}>"

    def __len__(self) -> int:
        return len(self.ejected)

    def choose(self, *, avoid: str | None = None, may_try: bool = False) -> str | None:
        """The replica that a call has to name, or None: HAProxy chooses. `done` must follow if there is a name.

        `avoid` has just failed at the same work. A call that can be repeated `may_try` an ejected one.
        """
        if avoid is None and not self.ejected:
            return None
        chosen = self._replicas.get(self._due()) if may_try else None
        if chosen is None and not (may_try and self._is_time_to_look_around()):
            fewest = (replica for replica in self._replicas.values() if self._is_good(replica, besides=avoid))
            chosen = min(fewest, key=lambda replica: (replica.calls, replica.chosen_last), default=None)
        if chosen is None:
            return None
        self._choices += 1
        chosen.chosen_last = self._choices
        chosen.calls += 1
        return chosen.name

    def done(self, name: str) -> None:
        """A call that named the replica is over, with whatever result."""
        if (replica := self._replicas.get(name)) is not None:
            replica.calls = max(0, replica.calls - 1)  # it may have been forgotten and met again

    def has_good_besides(self, name: str) -> bool:
        return any(self._is_good(replica, besides=name) for replica in self._replicas.values())

    def usable(self, name: str) -> None:
        """The replica has answered well, and takes part again if it had been ejected."""
        replica = self._replicas.setdefault(name, _Replica(name))
        replica.unusable = 0
        self.in_good_standing.add(name)
        if self.ejected.pop(name, None) is not None:
            replica.back_at = self._clock()
            log.warning("replica %s answers well again, and takes part", name)

    def unusable(self, name: str) -> None:
        """The replica has sent what no replica should send."""
        replica = self._replicas.setdefault(name, _Replica(name))
        replica.unusable += 1
        self.in_good_standing.discard(name)
        if name in self.ejected or replica.unusable < EJECT_AFTER or not self.has_good_besides(name):
            return
        now = self._clock()
        relapsed = now - replica.back_at < MAX_PAUSE_S
        replica.pause_s = min(MAX_PAUSE_S, 2 * replica.pause_s) if relapsed else FIRST_PAUSE_S
        if not self.ejected:
            self._look_around_at = now + LOOK_AROUND_S
        self.ejected[name] = now + replica.pause_s
        log.error(
            "replica %s is ejected: %d replies in a row could not be used; tried again in %.0f s",
            name,
            replica.unusable,
            replica.pause_s,
        )

    def forget(self, name: str) -> None:
        """A call named it and another replica answered: HAProxy has it no more. It is new when it answers again."""
        self._replicas.pop(name, None)
        self.in_good_standing.discard(name)
        self.ejected.pop(name, None)

    def _is_good(self, replica: _Replica, *, besides: str | None) -> bool:
        return replica.unusable == 0 and replica.name != besides and replica.name not in self.ejected

    def _due(self) -> str:
        """An ejected replica whose pause is over, "" if there is none. The next pause begins, and is longer."""
        now = self._clock()
        for name, try_at in self.ejected.items():
            if now >= try_at:
                replica = self._replicas[name]
                replica.pause_s = min(MAX_PAUSE_S, 2 * replica.pause_s)
                self.ejected[name] = now + replica.pause_s
                return name
        return ""

    def _is_time_to_look_around(self) -> bool:
        now = self._clock()
        if now < self._look_around_at:
            return False
        self._look_around_at = now + LOOK_AROUND_S
        return True
