"""Requests that nobody should send, as hypothesis strategies over raw bytes."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from tests.system.hostile.target import request

if TYPE_CHECKING:
    from collections.abc import Sequence

PATHS = [
    "/", "/embed", "/v1/embeddings", "/embeddings", "/tokenize", "/vectors", "/cache/clear", "/cache/stats", "/health",
    "/info", "/metrics", "/models", "/v1/models", "/v1/models/x", "/docs", "/openapi.json", "/nowhere", "/embed/",
    "/embed%00", "/cache/clear%0a", "/%ff%fe", "//embed", "/embed?x=" + "y" * 5000, "*", "/" + "a/" * 2000,
]  # fmt: skip
METHODS = ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "CONNECT", "PRI", "get", "\x00"]
FIELDS = [
    "texts", "inputs", "input", "text", "config", "model", "model_id", "normalize", "dimensions", "prompt_name",
    "truncate", "truncation_direction", "encoding_format", "cache_ttl_seconds", "input_type", "add_special_tokens", "",
]  # fmt: skip

ENCODABLE = st.characters(codec="utf-8")
OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "normalize": st.booleans(),
    "dimensions": st.integers(0, 5),
    "encoding_format": st.sampled_from(["float", "base64", "hex"]),
    "cache_ttl_seconds": st.integers(-1, 100),
    "truncate": st.booleans(),
    "nothing": st.none(),
}

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**400, -(10**4000), 10**4299, 1e308, math.nan, math.inf, -0.0]),
    st.floats(),
    st.text(st.characters(), max_size=20),  # lone surrogates and NUL among them
    st.sampled_from(["\ud800", "\udfff\ud800", "\x00", "a" * 3000, "\U0010ffff", "query", "base64", "left", "default"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=6), st.dictionaries(st.text(max_size=5), inner, max_size=4)),
    max_leaves=12,
)
sound = st.one_of(
    st.fixed_dictionaries(
        {"texts": st.lists(st.text(ENCODABLE, max_size=10), min_size=1, max_size=5)}, optional=OPTIONS
    ),
    st.fixed_dictionaries({"input": st.text(ENCODABLE, max_size=30)}, optional=OPTIONS),
    st.fixed_dictionaries({"inputs": st.lists(st.text(ENCODABLE, max_size=9), min_size=1)}, optional=OPTIONS),
)
bodies = st.one_of(
    sound,
    st.dictionaries(st.sampled_from(FIELDS), values, max_size=6),
    st.fixed_dictionaries({"texts": st.lists(st.text(max_size=10), min_size=1, max_size=5)}, optional={"x": values}),
    st.fixed_dictionaries({"input": st.lists(st.integers(-5, 100_300), min_size=1, max_size=5)}),
    values,
).map(lambda value: json.dumps(value).encode())
nested = st.builds(
    lambda opening, closing, depth, field: b'{"%b":' % field + opening * depth + b"1" + closing * depth + b"}",
    st.sampled_from([b"[", b'{"a":', b"[["]),
    st.sampled_from([b"]", b"}", b""]),
    st.sampled_from([10, 190, 250, 1500, 70_000]),
    st.sampled_from([b"texts", b"inputs", b"input", b"other"]),
)


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """Bytes with a piece cut out, put in or written over."""
    data = draw(whole)
    start = draw(st.integers(0, len(data)))
    end = draw(st.integers(start, min(len(data), start + 12)))
    return data[:start] + draw(st.binary(max_size=8)) + data[end:]


HEADERS = [
    b"x-priority", b"x-request-id", b"x-cache-ttl", b"cache-control", b"authorization", b"content-type", b"accept",
    b"expect", b"connection", b"upgrade", b"content-length", b"transfer-encoding", b"cookie", b"host",
]  # fmt: skip
HEADER_VALUES = [
    b"", b"bulk", b"interactive", b"Bearer ", b"Bearer \xff", b"100-continue", b"close", b"chunked", b"9" * 5000, b"-1",
    b"0", b"1e400", b"gzip", b"[", b"\xc2\xb2", b"no-cache", b"upgrade", b"h2c",
]  # fmt: skip
# never a time that would be kept, and passed: what is late is rightly answered with 504
TIMEOUTS = [b"-1", b"nan", b"inf", b"", b"9" * 400, b"ms"]
headers = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(HEADERS), st.one_of(st.sampled_from(HEADER_VALUES), st.binary(max_size=30))),
        st.tuples(st.just(b"x-request-timeout-ms"), st.sampled_from(TIMEOUTS)),
        st.tuples(st.binary(max_size=10), st.binary(max_size=10)),
    ).map(b": ".join),
    max_size=4,
)
hostile_bodies = st.one_of(bodies, damaged(bodies), nested, st.binary(max_size=200))
well_formed = st.builds(
    lambda path, body, method: request(path, body, method=method),
    st.one_of(st.sampled_from(PATHS[:6]), st.sampled_from(PATHS)),
    hostile_bodies,
    st.sampled_from(["POST"] * 8 + METHODS),
)
with_headers = st.builds(lambda path, body, lines: request(path, body, *lines), st.sampled_from(PATHS), bodies, headers)


def chunked(sizes: Sequence[bytes], body: bytes) -> bytes:
    head = b"POST /embed HTTP/1.1\r\nhost: gateway\r\ntransfer-encoding: chunked\r\n\r\n"
    return head + b"".join(size + b"\r\n" + body + b"\r\n" for size in sizes)


in_chunks = st.builds(
    chunked,
    st.lists(st.sampled_from([b"0", b"1", b"-1", b"F" * 20, b"5;x=y", b"zz", b"", b"10"]), max_size=5),
    st.binary(max_size=20),
)
cut_off = st.builds(lambda raw, part: raw[: int(len(raw) * part)], well_formed, st.floats(0, 1))
pipelined = st.lists(st.one_of(well_formed, cut_off), min_size=2, max_size=4).map(b"".join)
anything: st.SearchStrategy[Any] = st.one_of(
    *[well_formed] * 4,
    *[with_headers] * 2,
    damaged(well_formed),
    in_chunks,
    cut_off,
    pipelined,
    st.binary(max_size=300),
)
