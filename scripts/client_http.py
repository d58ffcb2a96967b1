"""The operator scripts' end of the wire: one kind of session, and replies that are checked before they are believed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp
import numpy as np
import orjson

if TYPE_CHECKING:
    from numpy.typing import NDArray


def open_session(
    *, concurrency: int, timeout: aiohttp.ClientTimeout, api_key: str | None, priority: str | None = None
) -> aiohttp.ClientSession:
    headers = {
        "content-type": "application/json",
        "accept-encoding": "identity",  # compressing digits costs the service more than sending them
    }
    if priority:
        headers["x-priority"] = priority
    if api_key:
        headers["authorization"] = f"Bearer {api_key}"
    connector = aiohttp.TCPConnector(limit=concurrency)
    return aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers)


class BrokenReply(Exception):
    """Status 200 with a body against the contract; the message says how."""


@dataclass(frozen=True, slots=True)
class EmbedReply:
    vectors: NDArray[np.float32]
    cached: int
    model: str


def read_embed_reply(body: bytes, texts: int) -> EmbedReply:
    """As many finite vectors of one length as texts were sent. Raises `BrokenReply`."""
    try:
        told = orjson.loads(body)
        vectors = np.asarray(told["embeddings"], np.float32)
        reply = EmbedReply(vectors, int(told["cached_count"]), str(told["model"]))
    except (ValueError, KeyError, TypeError):
        raise BrokenReply("a reply that is no embed reply") from None
    if vectors.ndim != 2 or len(vectors) != texts or not np.isfinite(vectors).all():  # noqa: PLR2004 - rows, columns
        raise BrokenReply(f"a broken reply: {texts} texts, vectors of shape {list(vectors.shape)}")
    return reply


def json_object(body: bytes) -> dict[str, Any]:
    """Empty for anything else: a refusal may come from whoever stands in between."""
    try:
        told = orjson.loads(body)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}
