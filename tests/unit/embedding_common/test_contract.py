from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from embedding_common import errors
from embedding_common.contract import Embedded, Lane, ModelCard, WireError, choose_lane, parse_timeout_s

CARD = ModelCard(
    id="m", fingerprint="f", dimension=3, max_tokens=16, prompts={"query": "ask: ", "ümlaut": "☃"}, backend="torch"
)


def embedded(texts: int = 2) -> Embedded:
    return Embedded(
        CARD,
        np.arange(texts * 3, dtype=np.float32).reshape(texts, 3) / np.float32(7),
        np.arange(texts, dtype=np.int32) + 5,
        np.arange(texts) % 2 == 1,
    )


def assert_same(left: Embedded, right: Embedded) -> None:
    assert left.card == right.card
    assert np.array_equal(left.vectors, right.vectors)
    assert np.array_equal(left.tokens, right.tokens)
    assert np.array_equal(left.truncated, right.truncated)


@given(st.integers(0, 40))
def test_what_is_written_is_read_back(texts: int) -> None:
    assert_same(Embedded.from_bytes(embedded(texts).to_bytes(), texts=texts), embedded(texts))


def test_the_safetensors_library_reads_what_we_write() -> None:
    tensors = safetensors.numpy.load(embedded().to_bytes())
    assert np.array_equal(tensors["embeddings"], embedded().vectors)
    assert np.array_equal(tensors["tokens"], embedded().tokens)
    assert np.array_equal(tensors["truncated"], embedded().truncated)


def test_we_read_what_the_safetensors_library_writes() -> None:
    reply = embedded()
    tensors = {"truncated": reply.truncated, "tokens": reply.tokens, "embeddings": reply.vectors}
    body = safetensors.numpy.save(tensors, metadata={"card": CARD.to_json()})
    assert_same(Embedded.from_bytes(body, texts=2), reply)


def test_vectors_that_are_a_view_or_big_endian_are_written_right() -> None:
    reply = embedded()
    other = Embedded(CARD, np.asfortranarray(reply.vectors).astype(">f4"), reply.tokens.astype(">i4"), reply.truncated)
    assert_same(Embedded.from_bytes(other.to_bytes(), texts=2), reply)


def test_the_data_starts_at_a_multiple_of_eight_bytes() -> None:
    body = embedded().to_bytes()
    assert int.from_bytes(body[:8], "little") % 8 == 0


@given(st.integers(0, 10_000))
def test_a_reply_cut_short_anywhere_is_a_wire_error(end: int) -> None:
    body = embedded().to_bytes()
    with pytest.raises(WireError):
        Embedded.from_bytes(body[: end % len(body)], texts=2)


@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8))
def test_garbled_bytes_are_a_wire_error_or_another_valid_reply(flips: list[tuple[int, int]]) -> None:
    body = bytearray(embedded().to_bytes())
    for position, value in flips:
        body[position % len(body)] = value
    try:
        reply = Embedded.from_bytes(bytes(body), texts=2)
    except WireError:
        return
    assert reply.vectors.shape == (2, reply.card.dimension)
    assert np.isfinite(reply.vectors).all()


@given(st.binary(max_size=300))
def test_any_bytes_at_all_are_a_wire_error(body: bytes) -> None:
    with pytest.raises(WireError):
        Embedded.from_bytes(body, texts=1)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-9, 1 << 70) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    ),
    st.sampled_from(["embeddings", "tokens", "truncated", "__metadata__"]),
    st.sampled_from(["dtype", "shape", "data_offsets", "card", None]),
)
def test_any_json_in_any_place_of_the_header_is_a_wire_error(junk: object, entry: str, key: str | None) -> None:
    body = embedded().to_bytes()
    length = int.from_bytes(body[:8], "little")
    header = json.loads(body[8 : 8 + length])
    if key is None:
        header[entry] = junk
    else:
        header[entry][key] = junk
    packed = json.dumps(header).encode()
    garbled = len(packed).to_bytes(8, "little") + packed + body[8 + length :]
    try:
        assert_same(Embedded.from_bytes(garbled, texts=2), embedded())  # an extra key changes nothing
    except WireError:
        return


def test_a_reply_for_another_number_of_texts_is_refused_and_both_shapes_are_named() -> None:
    with pytest.raises(WireError, match=r"\[2, 3\], expected F32 \[3, 3\]"):
        Embedded.from_bytes(embedded().to_bytes(), texts=3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_vector_that_is_not_finite_is_refused(value: float) -> None:
    reply = embedded()
    reply.vectors[1, 2] = value
    with pytest.raises(WireError, match="NaN or infinity"):
        Embedded.from_bytes(reply.to_bytes(), texts=2)


def test_a_number_of_tokens_below_0_is_refused() -> None:
    reply = embedded()
    reply.tokens[1] = -1
    with pytest.raises(WireError, match="tokens below 0"):
        Embedded.from_bytes(reply.to_bytes(), texts=2)


def test_a_card_survives_and_equal_cards_give_equal_text() -> None:
    assert ModelCard.from_json(CARD.to_json()) == CARD
    reordered = ModelCard(**{**json.loads(CARD.to_json()), "prompts": dict(reversed(list(CARD.prompts.items())))})
    assert reordered.to_json() == CARD.to_json()


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"id": "m"}', CARD.to_json().replace('"dimension":3', '"dimension":0')]
)
def test_a_broken_card_is_a_wire_error(text: str) -> None:
    with pytest.raises(WireError):
        ModelCard.from_json(text)


def test_a_card_of_another_release_is_read_by_what_both_know() -> None:
    fields = json.loads(CARD.to_json())
    older = {name: value for name, value in fields.items() if name != "pooling"}
    for card in (older, fields | {"of_a_later_release": 1}):
        assert ModelCard.from_json(json.dumps(card)) == CARD


def test_a_prompt_is_found_by_name_and_an_unknown_name_lists_the_known() -> None:
    assert CARD.prompt(None) == ""
    assert CARD.prompt("query") == "ask: "
    with pytest.raises(errors.InvalidRequest, match="query, ümlaut; got 'nope'"):
        CARD.prompt("nope")


def test_the_default_prompt_applies_when_none_is_named() -> None:
    card = ModelCard(id="m", fingerprint="f", dimension=1, max_tokens=1, prompts={"a": "A"}, default_prompt_name="a")
    assert card.prompt(None) == "A"


@pytest.mark.parametrize(
    ("header", "texts", "lane"),
    [(None, 4, "interactive"), (None, 5, "bulk"), ("bulk", 1, "bulk"), (" Interactive ", 99, "interactive")],
)
def test_the_lane_is_what_was_asked_for_or_what_the_size_suggests(header: str | None, texts: int, lane: str) -> None:
    assert choose_lane(header, texts) is Lane(lane)


def test_an_unknown_lane_is_refused() -> None:
    with pytest.raises(errors.InvalidRequest, match=r"x-priority: must be one of interactive\|bulk"):
        choose_lane("high", 1)


@pytest.mark.parametrize("header", ["0", "-1", "nan", "inf", "soon", "", "1e999"])
def test_a_time_limit_must_be_a_positive_number(header: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="x-request-timeout-ms"):
        parse_timeout_s(header)


def test_a_time_limit_is_read_in_milliseconds() -> None:
    assert parse_timeout_s("1500") == 1.5
    assert parse_timeout_s(None) is None
