from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_service.cache.entry import KEY_BYTES, NAME_CHARS, Entry, KeySpace, pack, unpack

KEY = bytes(range(KEY_BYTES))
ENTRY = Entry(struct.pack("<4f", 1, -2.5, 3e-9, 0), tokens=12, truncated=True, expires_at=2000.5)
STORED = pack(KEY, ENTRY)


def space(**changes: str) -> KeySpace:
    terms = {"fingerprint": "f", "prompt": "p", "direction": "right"} | changes
    return KeySpace(model_id="m", prompt_name=None, **terms)


def test_what_is_packed_comes_back_whole() -> None:
    assert unpack(KEY, STORED) == ENTRY


def test_the_layout_is_the_documented_one() -> None:
    magic, version, flags, dimension, tokens, _, expires_at = struct.unpack_from("<2sBBIIId", STORED)
    assert (magic, version, flags, dimension, tokens, expires_at) == (b"EV", 1, 1, 4, 12, 2000.5)
    assert STORED[24:] == ENTRY.vector


def test_an_entry_under_another_texts_key_is_a_miss() -> None:
    assert unpack(KEY[::-1], STORED) is None


@given(st.integers(0, len(STORED) * 8 - 1))
def test_any_flipped_bit_makes_it_a_miss(bit: int) -> None:
    damaged = bytearray(STORED)
    damaged[bit // 8] ^= 1 << bit % 8
    assert unpack(KEY, bytes(damaged)) is None


@given(st.binary(max_size=100))
def test_foreign_bytes_are_a_miss(stored: bytes) -> None:
    assert unpack(KEY, stored) is None


@given(st.integers(0, len(STORED) - 1))
def test_a_cut_entry_is_a_miss(length: int) -> None:
    assert unpack(KEY, STORED[:length]) is None


@pytest.mark.parametrize("change", [{"fingerprint": "g"}, {"prompt": "q"}, {"direction": "left"}])
def test_whatever_changes_the_vector_changes_the_key(change: dict[str, str]) -> None:
    assert space(**change).key("text") != space().key("text")


def test_parts_cannot_slide_into_each_other() -> None:
    assert space(fingerprint="fp", prompt="").key("text") != space(fingerprint="f", prompt="p").key("text")
    assert space(prompt="a").key("b") != space(prompt="").key("ab")


@given(st.text(), st.text())
def test_keys_are_equal_exactly_for_equal_texts(one: str, two: str) -> None:
    assert (space().key(one) == space().key(two)) is (one == two)


def test_a_name_belongs_to_one_text_in_one_space_of_the_process() -> None:
    texts = ["a", "1:a", ":a", "", "a" * NAME_CHARS, "a" * (NAME_CHARS + 1), "é" * (NAME_CHARS + 1)]
    spaces = [space(prompt=prompt) for prompt in ("", "1:", "query: ")] + [space() for _ in range(20)]
    names = [name for one in spaces[:3] for name in one.names(texts)] + [one.name("a") for one in spaces[3:]]
    assert len(set(names)) == len(names)
    assert spaces[0].names(texts) == [spaces[0].name(text) for text in texts]
