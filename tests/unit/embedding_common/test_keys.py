from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from embedding_common.keys import Keys, bearer, parse_keys, secrets_from_files

if TYPE_CHECKING:
    from pathlib import Path


def test_a_key_is_known_whole_and_no_other() -> None:
    keys = Keys(["first", "second"])
    assert b"first" in keys
    assert b"second" in keys
    assert not any(wrong in keys for wrong in (b"", b"fir", b"first ", b"First", b"first,second", b"\xff"))


def test_a_dump_of_the_keys_shows_none_of_them() -> None:
    keys = Keys(["marker-key"])
    assert "marker" not in repr(keys) + repr(vars(keys))


@pytest.mark.parametrize("text", ["a,b", " a , b ,", "a\nb\n", "a b"])
def test_keys_may_be_parted_by_commas_or_lines(text: str) -> None:
    assert parse_keys(text) == ("a", "b")


@pytest.mark.parametrize("text", ["", " , ,", "schlüssel", "a,b\x00"])
def test_a_list_that_would_open_to_all_or_to_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="key"):
        parse_keys(text)


@pytest.mark.parametrize(
    ("header", "key"),
    [
        (b"Bearer k", b"k"),
        (b"bearer  k ", b"k"),
        (b"Bearer ", b""),
        (b"Basic k", None),
        (b"k", None),
        (b"Bearer", None),
    ],
)
def test_the_key_is_what_follows_bearer(header: bytes, key: bytes | None) -> None:
    assert bearer({"headers": [(b"host", b"x"), (b"authorization", header)]}) == key


def test_a_secret_may_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("hidden\n")
    assert secrets_from_files({"NAME_FILE": str(file)}, ["NAME"])["NAME"] == "hidden"


@pytest.mark.parametrize("content", [None, b"", b" \n", b"\xff\xfe"])
def test_a_file_without_a_secret_leaves_no_door_open(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "secret"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"NAME_FILE: .*secret"):
        secrets_from_files({"NAME_FILE": str(file)}, ["NAME"])


def test_a_secret_that_is_given_twice_is_refused_and_not_shown(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^NAME and NAME_FILE are both set$"):
        secrets_from_files({"NAME": "hidden", "NAME_FILE": str(tmp_path)}, ["NAME"])
