"""The dialect of Weaviate's module text2vec-transformers: `POST /vectors`, with one text in each request.

The original is `app.py` of https://github.com/weaviate/t2v-transformers-models. Weaviate sends no content type.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import orjson
from pydantic import BaseModel, Field

from embedding_common import native
from embedding_service.api.dialects.dialect import Dialect, Fields, Options
from embedding_service.api.dialects.native import REFUSALS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from embedding_service.api.dialects.dialect import Limits


class VectorsConfig(Fields):
    task_type: Annotated[Literal["query", "passage"] | None, Field(description="Chooses the model's prompt.")] = None
    dimensions: Annotated[
        int | None, Field(ge=1, le=native.MAX_DIMENSIONS, description="Keep the first n components.")
    ] = None


class VectorsRequest(Fields):
    """`null` means absent; unknown fields are ignored."""

    text: str
    config: VectorsConfig | None = None


class VectorsReply(BaseModel):
    text: str
    vector: list[float]
    dim: int


def parse(body: bytes, limits: Limits) -> tuple[list[str], Options]:
    """Returns the text, as a list of one, and the options. Raises `Problem`."""
    request = native.read(VectorsRequest, body)
    native.check_texts([request.text], field="text", max_texts=1, max_text_bytes=limits.max_text_bytes)
    config = request.config or VectorsConfig()
    return [request.text], Options(input_type=config.task_type, dimensions=config.dimensions)


def write(items: list[bytes], /, *, texts: Sequence[str], dimension: int, **_: object) -> list[bytes]:
    """Returns the body of a reply in parts. It repeats the text, which Weaviate looks for."""
    return [b'{"text":%b,"vector":' % orjson.dumps(texts[0]), items[0], b',"dim":%d}' % dimension]


WEAVIATE = Dialect(name="Weaviate", texts_field="text", parse=parse, write=write, refusals=REFUSALS)

EXAMPLES: dict[str, dict[str, object]] = {
    "text": {"text": "hello world", "config": {"task_type": "query"}},
    "shorter": {"text": "hello world", "config": {"dimensions": 2}},
}
