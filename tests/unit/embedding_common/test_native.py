from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_common import errors, native
from embedding_common.contract import ModelCard

CARD = ModelCard(id="m", fingerprint="f", dimension=4, max_tokens=16)


def parse(body: Any, *, max_texts: int = 4, max_text_bytes: int = 64) -> native.EmbedRequest:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return native.parse(raw, max_texts=max_texts, max_text_bytes=max_text_bytes)


def test_absent_and_null_mean_the_same() -> None:
    optional = set(native.EmbedRequest.model_fields) - {"texts"}
    assert parse({"texts": ["a"]}) == parse({"texts": ["a"], **dict.fromkeys(optional)})


def test_unknown_fields_are_ignored() -> None:
    assert parse({"texts": ["a"], "user": "x"}).texts == ["a"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"texts", b'{"texts":["\xff"]}', b'{"texts":["\\ud800"]}', b'{"texts":["a"]} x', b"\x00"]
)
def test_what_is_not_json_in_utf8_is_malformed(body: bytes) -> None:
    with pytest.raises(errors.MalformedBody) as refused:
        parse(body)
    assert refused.value.field == "body"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "texts"),
        ([], "body"),
        (None, "body"),
        (7, "body"),
        ({"texts": None}, "texts"),
        ({"texts": []}, "texts"),
        ({"texts": "a"}, "texts"),
        ({"texts": {"0": "a"}}, "texts"),
        ({"texts": [1]}, "texts[0]"),
        ({"texts": ["a", None]}, "texts[1]"),
        ({"texts": [["a"]]}, "texts[0]"),
        ({"texts": ["a"] * 5}, "texts"),
        ({"texts": ["a", "b" * 65]}, "texts[1]"),
        ({"texts": ["ü" * 33]}, "texts[0]"),
        ({"texts": ["a"], "normalize": "yes"}, "normalize"),
        ({"texts": ["a"], "normalize": 1}, "normalize"),
        ({"texts": ["a"], "model_id": 3}, "model_id"),
        ({"texts": ["a"], "cache_ttl_seconds": -1}, "cache_ttl_seconds"),
        ({"texts": ["a"], "cache_ttl_seconds": 1.5}, "cache_ttl_seconds"),
        ({"texts": ["a"], "cache_ttl_seconds": "60"}, "cache_ttl_seconds"),
        ({"texts": ["a"], "cache_ttl_seconds": 10**12}, "cache_ttl_seconds"),
        ({"texts": ["a"], "dimensions": 0}, "dimensions"),
        ({"texts": ["a"], "dimensions": True}, "dimensions"),
        ({"texts": ["a"], "prompt_name": []}, "prompt_name"),
        ({"texts": ["a"], "truncate": "no"}, "truncate"),
        ({"texts": ["a"], "truncation_direction": "up"}, "truncation_direction"),
    ],
)
def test_a_wrong_field_is_named_in_message_and_field(body: Any, field: str) -> None:
    with pytest.raises(errors.InvalidRequest) as refused:
        parse(body)
    assert refused.value.field == field
    assert refused.value.message.startswith(f"{field}: ")
    assert refused.value.value is not None


def test_limits_stand_beside_what_was_sent() -> None:
    with pytest.raises(errors.InvalidRequest) as refused:
        parse({"texts": ["a"] * 5})
    assert (refused.value.limit, refused.value.value) == (4, 5)
    with pytest.raises(errors.InvalidRequest) as refused:
        parse({"texts": ["ü" * 33]})
    assert (refused.value.limit, refused.value.value) == (64, 66)
    with pytest.raises(errors.InvalidRequest) as refused:
        parse({"texts": ["a"], "cache_ttl_seconds": -1})
    assert (refused.value.limit, refused.value.value) == ("0", "-1")


def test_no_message_repeats_a_text() -> None:
    secret = "the text of somebody's diary, which goes on"
    for body in ({"texts": secret}, {"texts": ["a"], "normalize": secret}, {"texts": [{"t": secret}]}):
        with pytest.raises(errors.InvalidRequest) as refused:
            parse(body)
        assert secret not in json.dumps(native.error_body(refused.value, "id")[1].decode())


@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["texts", "normalize", "x"]), inner)
        ),
    ).map(lambda value: json.dumps(value).encode())
)
def test_whatever_is_sent_it_is_a_request_or_a_problem_that_can_be_written(body: bytes) -> None:
    try:
        assert parse(body).texts
    except errors.Problem as problem:
        status, reply = native.error_body(problem, "id")
        assert 400 <= status < 500
        assert json.loads(reply)["error"]


def test_every_problem_has_a_status() -> None:
    ours = {kind for kind in errors.Problem.__subclasses__() if kind.__module__ == errors.__name__}
    assert set(native.STATUS) == ours


def test_an_error_carries_all_it_knows_and_leaves_out_the_rest() -> None:
    status, body = native.error_body(errors.InvalidRequest("m", field="f", limit=1, value=2), "id")
    assert status == 422
    assert json.loads(body) == {
        "error": "m", "error_type": "Validation", "field": "f", "limit": 1, "value": 2, "request_id": "id",
    }  # fmt: skip
    assert set(json.loads(native.error_body(errors.Unavailable("m"), "id")[1])) == {"error", "error_type", "request_id"}


def test_the_model_named_must_be_served() -> None:
    assert native.check_model(None, ["a", "b"]) == "a"
    assert native.check_model("b", ["a", "b"]) == "b"
    with pytest.raises(errors.UnknownModel, match="'c' is not served here; available: a, b"):
        native.check_model("c", ["a", "b"])


def test_no_more_dimensions_than_the_model_has() -> None:
    native.check_dimensions(None, CARD)
    native.check_dimensions(4, CARD)
    with pytest.raises(errors.InvalidRequest, match="dimensions: m has 4, got 5"):
        native.check_dimensions(5, CARD)


def test_a_text_that_may_not_be_cut_is_refused_with_its_size() -> None:
    refusal = native.refuse_truncated(3, 20, CARD)
    assert (refusal.field, refusal.limit, refusal.value) == ("texts[3]", 16, 20)


def test_cutting_then_normalising_gives_unit_vectors_and_a_zero_row_stays_zero() -> None:
    vectors = np.array([[3, 4, 12, 0], [0, 0, 0, 1]], np.float32)
    assert np.allclose(native.shape(vectors, dimensions=2, normalize=True), np.array([[0.6, 0.8], [0, 0]]))
    assert np.array_equal(native.shape(vectors, dimensions=2, normalize=False), [[3, 4], [0, 0]])
    assert np.array_equal(native.shape(vectors, dimensions=None, normalize=False), vectors)


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 300])
def test_rows_written_in_pieces_are_one_json_document(rows: int) -> None:
    vectors = np.linspace(-1, 1, rows * 4, dtype=np.float32).reshape(rows, 4)
    pieces = list(native.encode_rows(vectors, None))
    assert len(pieces) == -(-rows // native.ROWS_PER_CHUNK)
    assert np.array_equal(np.array(json.loads(b"[" + b",".join(pieces) + b"]"), np.float32), vectors)


def test_base64_rows_are_little_endian_floats() -> None:
    vectors = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
    [piece] = native.encode_rows(vectors, "base64")
    rows = [np.frombuffer(base64.b64decode(row, validate=True), "<f4") for row in json.loads(b"[" + piece + b"]")]
    assert np.array_equal(rows, vectors)


def test_what_the_model_normalised_is_not_touched_again() -> None:
    vectors = np.random.default_rng(0).standard_normal((3, 384)).astype(np.float32)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert np.array_equal(native.shape(unit, dimensions=None, normalize=True), unit)


def test_a_reply_around_its_rows_is_what_the_documentation_promises() -> None:
    vectors = np.ones((2, 4), np.float32)
    rows = list(native.encode_rows(vectors, None))
    parts = native.assemble_reply(rows, dimension=4, texts=2, model="m", took_s=0.0125, cached=1, edition="simple")
    reply = json.loads(b"".join(parts))
    assert native.EmbedReply.model_validate(reply).model_dump() == reply
    assert reply["processing_time_ms"] == 12.5
    assert (reply["dimension"], reply["batch_size"], reply["cached_count"]) == (4, 2, 1)
