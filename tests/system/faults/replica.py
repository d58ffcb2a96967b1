"""A replica of no cost that can be told to misbehave, as a process where `LocalStack` has `ml_base`.

Every text has a vector that `vector` knows by heart. `POST /behave` with `{"as": WORD}` sets what it does from then on:

    well         answers
    slow         answers after SLOW_S
    garbage      answers 200 with bytes that mean nothing
    nan          answers vectors that hold NaN
    surplus      answers two vectors too many
    cut          promises a whole reply and breaks off in the middle
    error        answers 500
    other        is another model: another fingerprint, other vectors
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import orjson
import uvicorn

from embedding_common.contract import Embedded, ModelCard
from embedding_common.http import edge

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from starlette.types import Receive, Scope, Send

DIMENSION = 384
CARD = ModelCard("by-heart", "print-1", DIMENSION, 512)
OTHER = replace(CARD, fingerprint="print-2")
SLOW_S = 2.0
GARBAGE = b"\x00garbage\xff" * 100


def vector(text: str, card: ModelCard = CARD) -> NDArray[np.float32]:
    """Of unit length, so that nothing on the way has a reason to change a bit of it."""
    digest = hashlib.shake_128(f"{card.fingerprint} {text}".encode()).digest(DIMENSION)
    row = np.frombuffer(digest, np.uint8).astype(np.float32) - 127.5
    return np.asarray(row / np.linalg.norm(row), np.float32)


def embedded(texts: Sequence[str], card: ModelCard) -> Embedded:
    rows = np.stack([vector(text, card) for text in texts])
    return Embedded(card, rows, np.full(len(texts), 5, np.int32), np.zeros(len(texts), np.bool_))


class Replica:
    def __init__(self) -> None:
        self.manner = "well"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})
        path = scope["path"]
        asked = orjson.loads(await edge.read_body(scope, receive, limit_bytes=1 << 26) or b"{}")
        card = OTHER if self.manner == "other" else CARD
        if path == "/behave":
            self.manner = asked["as"]
            await edge.send_bytes(send, 200, [b"{}"])
        elif path == "/health":
            await edge.send_bytes(send, 200, [b'{"status":"healthy"}'])
        elif path == "/models":
            listed = {"id": card.id, "state": "ready", "card": orjson.loads(card.to_json())}
            await edge.send_bytes(send, 200, [orjson.dumps({"default": card.id, "models": [listed]})])
        else:
            await self._embed(send, asked["texts"], card)

    async def _embed(self, send: Send, texts: Sequence[str], card: ModelCard) -> None:
        whole = embedded(texts, card).to_bytes()
        match self.manner:
            case "slow":
                await asyncio.sleep(SLOW_S)
            case "garbage":
                whole = GARBAGE
            case "nan":
                spoiled = embedded(texts, card)
                spoiled.vectors[0, 0] = np.nan
                whole = spoiled.to_bytes()
            case "surplus":
                whole = embedded([*texts, "one more", "another"], card).to_bytes()
            case "error":
                await edge.send_bytes(send, 500, [b'{"error":"told to","error_type":"Backend"}'])
                return
            case "cut":
                headers = [(b"content-length", b"%d" % (2 * len(whole)))]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                await send({"type": "http.response.body", "body": whole})  # uvicorn closes: fewer bytes than promised
                return
        await edge.send_bytes(send, 200, [whole])


if __name__ == "__main__":
    port = int(os.environ["ML_BASE_PORT"])
    uvicorn.run(Replica(), host="127.0.0.1", port=port, log_level="error", lifespan="off")
