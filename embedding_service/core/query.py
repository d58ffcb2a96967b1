"""The domain types of the path: what a request asks for, what it gets back, and what stands in between."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from embedding_service.core.singleflight import NEVER

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from embedding_common.contract import Lane, ModelCard
    from embedding_service.cache.entry import Entry, KeySpace


class Outcome(enum.StrEnum):
    """Where the vector of a text came from. Every text that is sent ends in exactly one of these."""

    L1 = "l1"
    L2 = "l2"
    JOINED = "joined"
    UPSTREAM = "upstream"
    FAILED = "failed"


@dataclass(slots=True, kw_only=True)
class Query:
    """What one request wants. `deadline` is on the monotonic clock; `bypass` neither reads nor joins, but stores.

    A query is not changed once it is made. (It is not frozen, since that trebles what making one costs.)
    """

    texts: Sequence[str]
    lane: Lane
    request_id: str
    model_id: str | None = None
    prompt_name: str | None = None
    direction: str = "right"
    deadline: float = NEVER
    ttl_s: float | None = None
    bypass: bool = False
    caller_gone: Callable[[], Coroutine[None, None, None]] | None = None


@dataclass(frozen=True, slots=True)
class Miss:
    """The payload of a flight: one text to compute, and everything that decides its vector."""

    text: str
    space: KeySpace
    work_bytes: int
    lane: Lane  # the lane whose room it takes; the lane of its flight may rise later
    request_id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Resolved:
    """A value in hand, and where it came from for the request that claimed it."""

    entry: Entry
    outcome: Outcome


@dataclass(slots=True)
class Answer:
    """One entry and one outcome for each text, in the order of the texts, and their sums.

    `tokens` are those that the model reads over all texts: the same for a cached text as for a computed one.
    `truncated` and `cached` count texts.
    """

    card: ModelCard
    entries: Sequence[Entry]
    outcomes: Sequence[Outcome]
    tokens: int
    truncated: int
    cached: int
