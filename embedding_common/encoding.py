"""From a model's vectors to the vectors of a reply: cut and normalised as asked, then encoded as JSON or base64."""

from __future__ import annotations

from binascii import b2a_base64
from typing import TYPE_CHECKING

import numpy as np
import orjson

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

ROWS_PER_CHUNK = 128
"""How many vectors are written as JSON at once: 128 x 384 floats take about a millisecond, the longest time for which
the event loop is held."""

UNIT_TOLERANCE = 1e-5
"""How far the squared norm of a unit vector may be from 1: the rounding of float32 over hundreds of components."""


def fit_vectors(vectors: NDArray[np.float32], *, dimensions: int | None, normalize: bool) -> NDArray[np.float32]:
    """Cuts float32 [n, d] to the first `dimensions` components, then scales the rows to unit length if asked.

    A row of zeros stays as it is. Components are in Matryoshka order (arXiv:2205.13147): cutting a normalised vector
    shortens it, so the norm is taken last. Rows that the model itself normalised stay the same to the last bit.
    """
    if dimensions is not None and dimensions < vectors.shape[1]:
        vectors = vectors[:, :dimensions]
    if normalize:
        squares = np.einsum("ij,ij->i", vectors, vectors)
        if np.abs(squares - 1).max(initial=0) > UNIT_TOLERANCE:
            norms = np.sqrt(np.maximum(squares, np.float32(1e-24)))
            vectors = vectors / norms[:, None]
    return np.ascontiguousarray(vectors, np.float32)


def encode_row(vector: NDArray[np.float32], encoding_format: str | None) -> bytes:
    """Returns one float32 vector [d] encoded as `encode_rows` does it."""
    if encoding_format == "base64":
        return b'"%b"' % b2a_base64(vector.astype("<f4", copy=False).data, newline=False)
    return orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY)


def encode_rows(vectors: NDArray[np.float32], encoding_format: str | None) -> Iterator[bytes]:
    """Yields the rows of float32 [n, d] for a reply, separated by commas, `ROWS_PER_CHUNK` rows at a time.

    The caller may give other tasks their turn in between. Rows are lists of JSON numbers, or for "base64" the
    little-endian float32 bytes in the standard alphabet (RFC 4648), padded.
    """
    for start in range(0, len(vectors), ROWS_PER_CHUNK):
        chunk = vectors[start : start + ROWS_PER_CHUNK]
        if encoding_format == "base64":
            yield b",".join([encode_row(row, encoding_format) for row in chunk])
        else:
            yield orjson.dumps(chunk, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]
