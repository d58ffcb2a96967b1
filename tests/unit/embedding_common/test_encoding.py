from __future__ import annotations

import base64
import json

import numpy as np
import pytest

from embedding_common import encoding


def test_cutting_then_normalising_gives_unit_vectors_and_a_zero_row_stays_zero() -> None:
    vectors = np.array([[3, 4, 12, 0], [0, 0, 0, 1]], np.float32)
    assert np.allclose(encoding.fit_vectors(vectors, dimensions=2, normalize=True), np.array([[0.6, 0.8], [0, 0]]))
    assert np.array_equal(encoding.fit_vectors(vectors, dimensions=2, normalize=False), [[3, 4], [0, 0]])
    assert np.array_equal(encoding.fit_vectors(vectors, dimensions=None, normalize=False), vectors)


@pytest.mark.parametrize("rows", [1, 127, 128, 129, 300])
def test_rows_written_in_pieces_are_one_json_document(rows: int) -> None:
    vectors = np.linspace(-1, 1, rows * 4, dtype=np.float32).reshape(rows, 4)
    pieces = list(encoding.encode_rows(vectors, None))
    assert len(pieces) == -(-rows // encoding.ROWS_PER_CHUNK)
    assert np.array_equal(np.array(json.loads(b"[" + b",".join(pieces) + b"]"), np.float32), vectors)


def test_base64_rows_are_little_endian_floats() -> None:
    vectors = np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)
    [piece] = encoding.encode_rows(vectors, "base64")
    rows = [np.frombuffer(base64.b64decode(row, validate=True), "<f4") for row in json.loads(b"[" + piece + b"]")]
    assert np.array_equal(rows, vectors)


def test_what_the_model_normalised_is_not_touched_again() -> None:
    vectors = np.random.default_rng(0).standard_normal((3, 384)).astype(np.float32)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert np.array_equal(encoding.fit_vectors(unit, dimensions=None, normalize=True), unit)
