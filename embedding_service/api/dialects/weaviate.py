"""What Weaviate's module text2vec-transformers asks of its model server: `POST /vectors`, one text a request.

Theirs: https://github.com/weaviate/t2v-transformers-models, `app.py`. It sends no content type.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field

from embedding_common import native
from embedding_service.api.serving import Options

if TYPE_CHECKING:
    from embedding_service.api.serving import Exchange, Serving
    from embedding_service.core.query import Answer


class VectorsConfig(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    task_type: Annotated[Literal["query", "passage"] | None, Field(description="Chooses the model's prompt.")] = None
    dimensions: Annotated[
        int | None, Field(ge=1, le=native.MAX_DIMENSIONS, description="Keep the first n components.")
    ] = None


class VectorsRequest(BaseModel):
    """`null` means absent; unknown fields are ignored."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    text: str
    config: VectorsConfig | None = None


class VectorsReply(BaseModel):
    text: str
    vector: list[float]
    dim: int


class WeaviateDialect:
    """Answers with the text it was sent, which they look for."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def embed(self, exchange: Exchange) -> None:
        """Raises `Problem`."""
        request = native.read(VectorsRequest, exchange.body)
        limits = self._serving
        native.check_texts([request.text], field="text", max_texts=1, max_text_bytes=limits.max_text_bytes)
        config = request.config or VectorsConfig()
        options = Options(input_type=config.task_type, dimensions=config.dimensions)
        await limits.reply(exchange, [request.text], options, _Shape(request.text))


class _Shape:
    def __init__(self, text: str) -> None:
        self._text = text

    def items(self, rows: list[bytes], start: int) -> list[bytes]:  # noqa: ARG002 - there is one
        return rows

    def frame(self, chunks: list[bytes], answer: Answer, options: Options, took_s: float) -> list[bytes]:  # noqa: ARG002
        dim = options.dimensions or answer.card.dimension
        return [b'{"text":%b,"vector":' % orjson.dumps(self._text), chunks[0], b',"dim":%d}' % dim]
