"""`POST /tokenize`, as text-embeddings-inference has it: the tokens of the served model's own tokenizer.

The path embeds nothing and is not cached: each request goes to a replica.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson
from pydantic import BaseModel

from embedding_common import native
from embedding_service.api.dialects import tei
from embedding_service.api.dialects.dialect import Fields
from embedding_service.errors import InferenceFailed

if TYPE_CHECKING:
    from embedding_common.contract import TokenizedText
    from embedding_service.api.dialects.dialect import Limits
    from embedding_service.service import Service


class TokenizeRequest(Fields):
    """`null` means absent; unknown fields are ignored."""

    inputs: tei.InputsField
    add_special_tokens: bool | None = None
    prompt_name: str | None = None
    model_id: tei.ModelField = None


class Token(BaseModel):
    """`start` and `stop` count characters; `null` for tokens that stand for no text."""

    id: int
    text: str
    special: bool
    start: int | None
    stop: int | None


EXAMPLES: dict[str, dict[str, object]] = {"texts": {"inputs": ["hello world"], "add_special_tokens": True}}


async def tokenize(service: Service, body: bytes, limits: Limits, request_id: str) -> bytes:
    """Returns a list of tokens for each text, as JSON. Raises `Problem`."""
    request = native.read(TokenizeRequest, body)
    texts = tei.texts_of(request.inputs, limits)
    native.check_tokenizable(texts, field="inputs")
    card = await service.catalog.learn(request.model_id)
    prompt = card.prompt(request.prompt_name)
    asked = {
        "texts": texts,
        "model_id": card.id,
        "prompt_name": request.prompt_name,
        "add_special_tokens": request.add_special_tokens is not False,
    }
    tokenized = await service.replicas.tokenize(asked, request_id)
    if len(tokenized.texts) != len(texts):
        raise InferenceFailed(f"a replica tokenized {len(tokenized.texts)} texts of {len(texts)}")
    return orjson.dumps([_tokens(prompt + text, item) for text, item in zip(texts, tokenized.texts, strict=True)])


def _tokens(text: str, tokenized: TokenizedText) -> list[dict[str, Any]]:
    """Returns each token with the part of `text` that it stands for; a special token has a name instead."""
    rows = zip(tokenized.ids, tokenized.tokens, tokenized.offsets, tokenized.special, strict=True)
    return [
        {
            "id": token_id,
            "text": token if offsets is None else text[offsets[0] : offsets[1]],
            "special": special,
            "start": offsets and offsets[0],
            "stop": offsets and offsets[1],
        }
        for token_id, token, offsets, special in rows
    ]
