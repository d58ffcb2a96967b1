"""A replica of no cost, as a process: `python replica.py PORT`. Every text has a vector made from its digest."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import orjson
import uvicorn

from embedding_common.http import edge
from tests.support.gateway import CARD, embedded

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

LISTED = {"default": CARD.id, "models": [{"id": CARD.id, "state": "ready", "card": orjson.loads(CARD.to_json())}]}


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["path"] == "/models":
        await edge.send_bytes(send, 200, [orjson.dumps(LISTED)])
        return
    scope.setdefault("state", {})
    asked = orjson.loads(await edge.read_body(scope, receive, limit_bytes=1 << 26))
    if scope["path"] == "/tokenize":
        texts = [
            {"ids": [1], "tokens": ["a"], "offsets": [[0, len(text)]], "special": [False]} for text in asked["texts"]
        ]
        await edge.send_bytes(send, 200, [orjson.dumps({"model": CARD.id, "texts": texts})])
        return
    prompt = CARD.prompt(asked["prompt_name"])
    result = embedded(asked["texts"], CARD, prompt, asked["truncation_direction"])
    await edge.send_bytes(send, 200, [result.to_bytes()])


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", lifespan="off")
