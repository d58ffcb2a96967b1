"""What is known of one model that may be served, loaded or not."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio

    from embedding_common.contract import ModelCard
    from ml_base.models.loading import Source
    from ml_base.models.models import ServedModel


class State(enum.StrEnum):
    """Where a model stands between two requests for it."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    """The last attempt failed; the next request for the model is another one."""


@dataclass(slots=True)
class ModelRecord:
    """One model that may be served here. `used_at` is on the clock of `Models`, in seconds."""

    source: Source
    state: State = State.UNLOADED
    card: ModelCard | None = None  # kept when the model is unloaded: a gateway builds cache keys from it
    served: ServedModel | None = None
    self_test: float | None = None
    memory_bytes: int | None = None
    problem: str | None = None
    loading: asyncio.Task[ServedModel] | None = None
    users: int = 0
    used_at: float = 0.0

    def listed(self) -> dict[str, Any]:
        """Returns what `/models` says of it."""
        return {
            "id": self.source.id,
            "state": self.state,
            "card": self.card,
            "self_test": self.self_test,  # lowest cosine to torch in float32; null: it is torch in float32
            "slice_tokens": self.served.batch_tokens if self.served else None,
            "memory_bytes": self.memory_bytes,  # by how much the process grew when it was loaded
            "problem": self.problem,
        }
