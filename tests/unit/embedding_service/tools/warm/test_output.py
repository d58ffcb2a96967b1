"""The files of vectors."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from embedding_service.tools.warm import __main__ as warm_cache
from embedding_service.tools.warm import output as warm_output
from tests.support.embedding_server import refusal, vector_of, warm

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.embedding_server import FakeService


def test_npy_rows_are_the_vectors_in_the_order_of_the_file(service: FakeService, corpus: Path) -> None:
    out = corpus.with_name("vectors.npy")
    assert warm(service, corpus, "--out", str(out), "--batch", "3", "--concurrency", "8") == 0
    vectors = np.load(out, mmap_mode="r")
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, [vector_of(text) for text in corpus.read_text().splitlines()])


def test_the_row_of_a_failed_text_is_nan_even_before_any_vector_is_known(service: FakeService, tmp_path: Path) -> None:
    file, out = tmp_path / "mixed.jsonl", tmp_path / "vectors.npy"
    file.write_text('bad\nbad\n\n"good"\nbad\n')
    assert warm(service, file, "--format", "jsonl", "--out", str(out), "--batch", "1") == 1
    vectors = np.load(out)
    assert np.isnan(vectors).all(axis=1).tolist() == [True, True, False, True]
    np.testing.assert_array_equal(vectors[2], vector_of("good"))


def test_json_lines_hold_line_vector_and_error(service: FakeService, tmp_path: Path) -> None:
    file, out = tmp_path / "mixed.txt", tmp_path / "vectors.jsonl"
    file.write_bytes(b"good\n\n\xff\n")
    assert warm(service, file, "--out", str(out), "--dimensions", "2") == 1
    good, bad = map(json.loads, out.read_text().splitlines())
    np.testing.assert_array_equal(np.float32(good["embedding"]), vector_of("good")[:2])
    assert (good["line"], bad["line"], bad["embedding"]) == (1, 3, None)
    assert bad["error"].startswith("not UTF-8")


def test_a_mistyped_url_costs_no_vectors_of_an_earlier_run(
    service: FakeService, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--out", str(corpus.with_name("vectors.npy")), "--batch", "10"]
    service.misbehave = lambda request: refusal(503, "gone") if "text number 77" in request["texts"] else None
    assert warm(service, corpus, *options, "--patience", "0.001") == 1
    assert warm_cache.main([str(corpus), *options, "--url", "http://127.0.0.1:1"]) == 2
    service.misbehave = lambda _: None
    assert warm(service, corpus, *options) == 0
    assert "resuming after line 70: 70 texts are done" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".npy", ".jsonl"])
def test_a_resumed_file_of_vectors_equals_one_written_in_one_go(
    service: FakeService, corpus: Path, suffix: str
) -> None:
    whole, resumed = corpus.with_name(f"whole{suffix}"), corpus.with_name(f"resumed{suffix}")
    warm(service, corpus, "--out", str(whole))
    options = ["--out", str(resumed), "--batch", "10"]
    service.misbehave = lambda request: refusal(503, "gone") if "text number 77" in request["texts"] else None
    assert warm(service, corpus, *options, "--patience", "0.001") == 1
    assert not resumed.exists()
    with warm_output.part_of(resumed).open("ab") as part:
        part.write(b"half a row that a crash left behind")
    service.misbehave = lambda _: None
    assert warm(service, corpus, *options) == 0
    assert resumed.read_bytes() == whole.read_bytes()


def test_vectors_of_two_models_never_end_up_in_one_file(
    service: FakeService, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(request: dict[str, Any]) -> None:
        service.model = "other" if "text number 50" in request["texts"] else service.model

    service.misbehave = change
    out = corpus.with_name("vectors.npy")
    assert warm(service, corpus, "--out", str(out), "--batch", "1", "--concurrency", "1") == 2
    assert "the service now answers with other (6): --restart begins again" in capsys.readouterr().err
    assert not out.exists()


def test_a_second_copy_on_the_same_output_is_refused(
    service: FakeService, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = corpus.with_name("x.npy")
    first = warm_output.NpyOutput(out, 0)
    assert warm(service, corpus, "--out", str(out)) == 2
    first.close()
    assert "another copy of this script writes it" in capsys.readouterr().err
