"""The native dialect: `POST /embed` with `texts`. Its functions are those of `embedding_common.native`."""

from __future__ import annotations

from functools import partial

from embedding_common import native, refusals
from embedding_service.api.dialects.dialect import Dialect, Options, Refusals


class NativeEmbedRequest(native.EmbedRequest, Options):
    """Texts to embed. `null` means absent for every optional field; unknown fields are ignored."""


REFUSALS = Refusals(
    error_body=refusals.error_body,
    reply=refusals.ErrorReply,
    statuses=tuple(status for status, _ in refusals.STATUS.values()),
)

NATIVE = Dialect(
    name="native",
    texts_field="texts",
    parse=partial(native.parse, NativeEmbedRequest),
    write=native.write_reply,
    refusals=REFUSALS,
)

EXAMPLES: dict[str, dict[str, object]] = {
    "native": {"texts": ["hello world", "second text"]},
    "native_shorter": {"texts": ["hello world"], "dimensions": 2, "encoding_format": "base64"},
    "native_query": {"texts": ["hello world"], "input_type": "query", "cache_ttl_seconds": 60},
}
