"""HTTP sessions of the tools, and readers of replies. Each reply is checked before its figures are used."""

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
    """Returns a session with at most `concurrency` connections; it sends `api_key` and `priority` with each request."""
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
    """A reply has status 200, but its body breaks the contract of `POST /embed`. The message says how."""


@dataclass(frozen=True, slots=True)
class EmbedReply:
    """The vectors are float32 [texts, dimension]; `cached` counts the texts that came from a cache."""

    vectors: NDArray[np.float32]
    cached: int
    model: str


def read_embed_reply(body: bytes, texts: int) -> EmbedReply:
    """Returns the reply, if it holds as many finite vectors of one length as texts were sent.

    Raises `BrokenReply` for any other body.
    """
    try:
        fields = orjson.loads(body)
        vectors = np.asarray(fields["embeddings"], np.float32)
        reply = EmbedReply(vectors, int(fields["cached_count"]), str(fields["model"]))
    except (ValueError, KeyError, TypeError):
        raise BrokenReply("a reply that is no embed reply") from None
    if vectors.ndim != 2 or len(vectors) != texts or not np.isfinite(vectors).all():  # noqa: PLR2004 - rows, columns
        raise BrokenReply(f"a broken reply: {texts} texts, vectors of shape {list(vectors.shape)}")
    return reply


def json_object(body: bytes) -> dict[str, Any]:
    """Returns the JSON object in `body`, or an empty one.

    A refusal may come from a proxy between this tool and the service, and then it need not be JSON.
    """
    try:
        fields = orjson.loads(body)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}
