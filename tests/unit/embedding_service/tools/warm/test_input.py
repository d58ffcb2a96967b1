"""What a line may be, and how bytes become lines."""

from __future__ import annotations

import random

import pytest

from embedding_service.tools.warm import input as warm_input


def read_entries(data: bytes, *, line_format: str | None = None, field: str = "text") -> list[warm_input.Entry]:
    cutter, decoder = warm_input.LineCutter(), warm_input.Decoder(line_format, field)
    lines = [*cutter.feed(data), *cutter.end()]
    return [entry for entry in map(decoder.entry, lines) if entry is not None]


def test_json_lines_are_strings_or_objects() -> None:
    entries = read_entries(b'{"text": "a"}\n"b"\n', field="text")
    assert [entry.text for entry in entries] == ["a", "b"]


def test_a_quoted_sentence_does_not_make_a_file_json() -> None:
    assert [entry.text for entry in read_entries(b'"Hello," he said.\n{broken\n')] == ['"Hello," he said.', "{broken"]


def test_a_named_text_format_takes_json_as_it_stands() -> None:
    assert [entry.text for entry in read_entries(b'{"text": "a"}\n', line_format="text")] == ['{"text": "a"}']


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        pytest.param(b"{nonsense", "not JSON", id="syntax"),
        pytest.param(b'{"body": "x"}', "no field 'text'", id="field"),
        pytest.param(b'{"text": 3}', "not a string but int", id="type"),
        pytest.param(b"[1]", "not a string but list", id="list"),
        pytest.param(b'"\\ud800"', "not JSON", id="lone surrogate"),
        pytest.param(b'"\xff"', "not JSON", id="not UTF-8"),
    ],
)
def test_a_bad_json_line_says_what_is_wrong(line: bytes, reason: str) -> None:
    (entry,) = read_entries(line, line_format="jsonl")
    assert reason in (entry.error or "")


def test_line_ends_and_a_byte_order_mark_are_no_part_of_a_text() -> None:
    entries = read_entries(b"\xef\xbb\xbfone\r\n\r\n  \ntwo")
    assert [(entry.line, entry.text) for entry in entries] == [(1, "one"), (4, "two")]


def test_lines_are_the_same_however_the_bytes_arrive() -> None:
    data = b"first\n\nthird \xc3\xa9\r\n" + b"x" * 100 + b"\nno newline at the end"
    whole = [*(cutter := warm_input.LineCutter()).feed(data), *cutter.end()]
    for seed in range(20):
        cuts = sorted(random.Random(seed).sample(range(len(data)), 8))
        cutter = warm_input.LineCutter()
        pieces = [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        assert [line for piece in pieces for line in cutter.feed(piece)] + cutter.end() == whole
    assert whole[-1].end_bytes == len(data)


def test_a_line_too_long_to_hold_is_named_and_the_next_one_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_input, "MAX_LINE_BYTES", 10)
    cutter = warm_input.LineCutter()
    lines = [*cutter.feed(b"x" * 8), *cutter.feed(b"y" * 8), *cutter.feed(b"z" * 8 + b"\nok\n"), *cutter.end()]
    assert [(line.number, line.data, line.end_bytes) for line in lines] == [(1, None, 25), (2, b"ok", 28)]
