"""Turns cached vectors into what a reply carries: cut, normalised, as JSON or base64.

To write 384 floats as digits costs more than all else on the path of a cached text. So the entries asked for most often
keep the JSON of their last reply, within a limit of bytes.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np
import orjson
from pybase64 import b64encode

from embedding_common.encoding import UNIT_TOLERANCE, encode_row, fit_vectors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from embedding_service.cache.entry import Entry

KEEP_ONE_IN = 8
"""One in so many of the vectors that are turned into JSON keeps it. A vector that is often asked for has it soon, while
one that is rarely asked for seldom pushes another out."""

_FLOATS = np.dtype("<f4")  # made once: numpy would parse the string at each use


def matrix(entries: Sequence[Entry]) -> NDArray[np.float32]:
    """Returns the model's own vectors, float32 [entries, dimension]."""
    joined = b"".join([entry.vector for entry in entries])
    return np.frombuffer(joined, _FLOATS).reshape(len(entries), -1)


def unit_vector(entry: Entry) -> bytes:
    """Returns the vector at unit length, little-endian float32; its own bytes if the model has normalised it."""
    if entry.unit is None:
        vector = np.frombuffer(entry.vector, _FLOATS)
        entry.unit = bool(abs(np.dot(vector, vector) - 1) <= UNIT_TOLERANCE)
    return entry.vector if entry.unit else fit_vectors(matrix([entry]), dimensions=None, normalize=True).tobytes()


class Renderer:
    """Encodes entries for replies. Keeps at most `max_ready_bytes` of JSON, and drops the oldest first."""

    def __init__(self, *, max_ready_bytes: int) -> None:
        self.ready_bytes = 0
        self._max_ready_bytes = max_ready_bytes
        self._ready: deque[Entry] = deque()
        self._made = 0

    def __repr__(self) -> str:
        return f"<Renderer {len(self._ready)} ready, {self.ready_bytes} of {self._max_ready_bytes} bytes>"

    def rows(
        self, entries: Sequence[Entry], *, dimensions: int | None, normalize: bool, encoding_format: str | None
    ) -> list[bytes]:
        """Returns the encoded vectors of `entries`. A caller with more than `ROWS_PER_CHUNK` of them hands them in by
        chunks, and yields to the loop in between.
        """
        if dimensions is not None or not normalize:
            vectors = fit_vectors(matrix(entries), dimensions=dimensions, normalize=normalize)
            return [encode_row(vector, encoding_format) for vector in vectors]
        if encoding_format == "base64":
            return [b'"%b"' % b64encode(entry.vector if entry.unit else unit_vector(entry)) for entry in entries]
        return [entry.ready or self._render(entry) for entry in entries]

    def _render(self, entry: Entry) -> bytes:
        row = orjson.dumps(np.frombuffer(unit_vector(entry), _FLOATS), option=orjson.OPT_SERIALIZE_NUMPY)
        self._made += 1
        if self._made % KEEP_ONE_IN == 0:
            self._keep(entry, row)
        return row

    def _keep(self, entry: Entry, row: bytes) -> None:
        entry.ready = bytes(memoryview(row))  # a copy of exactly its size: orjson returns bytes in a larger allocation
        self._ready.append(entry)
        self.ready_bytes += len(row)
        while self.ready_bytes > self._max_ready_bytes:
            oldest = self._ready.popleft()
            self.ready_bytes -= len(oldest.ready or b"")
            oldest.ready = None
