"""Replies are checked before they are believed."""

from __future__ import annotations

import pytest

from embedding_service.tools.client import http as client_http


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{}", b'{"embeddings": [[1, 2], [3]], "cached_count": 0, "model": "m"}', b'{"embeddings": [[null]]}'],
)
def test_what_is_no_embed_reply_is_never_taken_for_one(body: bytes) -> None:
    with pytest.raises(client_http.BrokenReply):
        client_http.read_embed_reply(body, 2)
