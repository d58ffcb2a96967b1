from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_common import encoding, errors, native, refusals


class Limits:
    max_texts = 4
    max_text_bytes = 64


def parse(body: Any) -> native.EmbedRequest:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return native.parse(native.EmbedRequest, raw, Limits())[1]


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
    secret = "the text of a private diary, which goes on"
    for body in ({"texts": secret}, {"texts": ["a"], "normalize": secret}, {"texts": [{"t": secret}]}):
        with pytest.raises(errors.InvalidRequest) as refused:
            parse(body)
        assert secret not in json.dumps(refusals.error_body(refused.value, "id")[1].decode())


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
        status, reply = refusals.error_body(problem, "id")
        assert 400 <= status < 500
        assert json.loads(reply)["error"]


def test_a_reply_around_its_rows_is_what_the_documentation_promises() -> None:
    vectors = np.ones((2, 4), np.float32)
    rows = list(encoding.encode_rows(vectors, None))
    parts = native.write_reply(
        rows, dimension=4, texts=["a", "b"], model="m", took_s=0.0125, cached=1, edition="simple"
    )
    reply = json.loads(b"".join(parts))
    assert native.EmbedReply.model_validate(reply).model_dump() == reply
    assert reply["processing_time_ms"] == 12.5
    assert (reply["dimension"], reply["batch_size"], reply["cached_count"]) == (4, 2, 1)


@pytest.mark.parametrize("opening", [b"[", b"{"])
def test_a_body_of_more_lists_and_objects_than_any_request_needs_is_refused_before_it_is_parsed(opening: bytes) -> None:
    with pytest.raises(errors.BodyTooLarge) as refused:
        parse(opening * (native.MAX_CONTAINERS + 1))
    assert (refused.value.field, refused.value.limit) == ("body", native.MAX_CONTAINERS)
    assert refused.value.value == native.MAX_CONTAINERS + 1


def test_brackets_within_strings_do_not_count() -> None:
    body = json.dumps({"texts": ["a"], "user": '[{"\\' * native.MAX_CONTAINERS}).encode()
    assert parse(body).texts == ["a"]
