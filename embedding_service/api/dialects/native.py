"""`POST /embed` with `texts`: the native dialect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from embedding_common import native
from embedding_service.api.serving import Options

if TYPE_CHECKING:
    from embedding_service.api.serving import Exchange, Serving
    from embedding_service.core.query import Answer


class NativeEmbedRequest(native.EmbedRequest, Options):
    """Texts to embed. `null` means absent for every optional field; unknown fields are ignored."""


class NativeDialect:
    """Answers with an object that also tells dimension, model, time and what was cached."""

    def __init__(self, serving: Serving, *, edition: str) -> None:
        self._serving = serving
        self._edition = edition

    async def embed(self, exchange: Exchange) -> None:
        """Raises `Problem`."""
        request = native.read(NativeEmbedRequest, exchange.body)
        native.check_texts(
            request.texts,
            field="texts",
            max_texts=self._serving.max_texts,
            max_text_bytes=self._serving.max_text_bytes,
        )
        await self._serving.reply(exchange, request.texts, request, self)

    def items(self, rows: list[bytes], start: int) -> list[bytes]:  # noqa: ARG002 - every row is alike here
        return rows

    def frame(self, chunks: list[bytes], answer: Answer, options: NativeEmbedRequest, took_s: float) -> list[bytes]:
        return native.assemble_reply(
            chunks,
            dimension=options.dimensions or answer.card.dimension,
            texts=len(answer.entries),
            model=answer.card.id,
            took_s=took_s,
            cached=answer.cached,
            edition=self._edition,
        )
