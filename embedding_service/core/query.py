"""What a dialect hands to the embedder, and what it gets back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from embedding_service.core.singleflight import NEVER
from embedding_service.observability.metrics import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from embedding_common.contract import Lane, ModelCard
    from embedding_service.cache.entry import Entry, KeySpace


@dataclass(slots=True, kw_only=True)
class Ask:
    """What one request wants. `deadline` is on the monotonic clock; `bypass` neither reads nor joins, but stores.

    Not to be changed. (Not frozen, since that trebles what making one costs.)
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
    """The payload of a flight: one text to compute, and what decides its vector."""

    text: str
    space: KeySpace
    work_bytes: int
    lane: Lane  # whose room it takes; the flight's own lane may rise
    request_id: str
    epoch: int


@dataclass(slots=True)
class Answer:
    """One entry and one outcome for each text, in the order of the texts; and what they come to, counted once.

    `tokens` are those the model read, over all texts: the same for a cached text as for a computed one.
    """

    card: ModelCard
    entries: Sequence[Entry]
    outcomes: Sequence[Outcome]
    tokens: int = field(init=False)
    truncated: int = field(init=False)
    cached: int = field(init=False)

    def __post_init__(self) -> None:
        limit = self.card.max_tokens
        tokens = [entry.tokens for entry in self.entries]
        self.tokens = sum(tokens) if max(tokens) <= limit else sum([min(read, limit) for read in tokens])
        self.truncated = sum([entry.truncated for entry in self.entries])
        self.cached = len(self.outcomes) - self.outcomes.count(Outcome.UPSTREAM)
