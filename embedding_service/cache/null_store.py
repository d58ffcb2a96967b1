"""The store of a gateway without Redis (`REDIS_ENABLED=false`): it finds nothing and keeps nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Self

    from embedding_common.contract import ModelCard
    from embedding_service.cache.entry import Entry


class NullStore:
    """Has every method of `RedisStore`, and does nothing."""

    enabled = False
    connected = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        return

    async def get_many(self, epoch: int, keys: Sequence[bytes]) -> dict[bytes, Entry]:  # noqa: ARG002 - finds nothing
        return {}

    def put_soon(self, epoch: int, entries: Iterable[tuple[bytes, Entry]]) -> None:
        """Drops the entries without counting them: no reader expects them anywhere."""

    async def clear(self) -> int | None:
        return None

    async def remember(self, cards: Sequence[ModelCard]) -> None:
        """Keeps nothing."""

    async def recall(self) -> list[ModelCard]:
        return []
