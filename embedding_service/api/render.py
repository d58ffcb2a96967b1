"""From cached bytes to what a reply carries: cut, normalised, as JSON or base64.

Turning 384 floats into digits costs more than everything else on the path of a cached text. So the hottest entries keep
the JSON of their last reply, within a bound of bytes.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import numpy as np
import orjson
from pybase64 import b64encode

from embedding_common.native import ROWS_PER_CHUNK, UNIT_TOLERANCE, encode_row, shape

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from embedding_service.cache.entry import Entry

KEEP_ONE_IN = 8
"""Of the vectors turned into JSON, one in so many keeps it: a hot one has it soon, while vectors that are rarely asked
for seldom push one out."""

_FLOATS = np.dtype("<f4")  # made once: numpy reads the words for it anew each time


def matrix(entries: Sequence[Entry]) -> NDArray[np.float32]:
    """The model's own vectors, float32 [entries, dimension]."""
    joined = b"".join([entry.vector for entry in entries])
    return np.frombuffer(joined, _FLOATS).reshape(len(entries), -1)


def unit_vector(entry: Entry) -> bytes:
    """The vector at unit length; its own bytes if the model has normalised it."""
    if entry.unit is None:
        vector = np.frombuffer(entry.vector, _FLOATS)
        entry.unit = bool(abs(np.dot(vector, vector) - 1) <= UNIT_TOLERANCE)
    return entry.vector if entry.unit else shape(matrix([entry]), dimensions=None, normalize=True).tobytes()


class Renderer:
    """Encodes entries for replies. Keeps at most `max_ready_bytes` of JSON; what was made first goes first."""

    def __init__(self, *, max_ready_bytes: int) -> None:
        self.ready_bytes = 0
        self._max_ready_bytes = max_ready_bytes
        self._ready: deque[Entry] = deque()
        self._made = 0

    def __repr__(self) -> str:
        return f"<Renderer {len(self._ready)} ready, {self.ready_bytes} of {self._max_ready_bytes} bytes>"

    def rows(
        self, entries: Sequence[Entry], *, dimensions: int | None, normalize: bool, encoding_format: str | None
    ) -> Iterator[list[bytes]]:
        """Encoded vectors, a chunk at a time, so that a caller may yield to the loop in between."""
        plain = dimensions is None and normalize
        for start in range(0, len(entries), ROWS_PER_CHUNK):
            chunk = entries[start : start + ROWS_PER_CHUNK]
            if not plain:
                vectors = shape(matrix(chunk), dimensions=dimensions, normalize=normalize)
                yield [encode_row(vector, encoding_format) for vector in vectors]
            elif encoding_format == "base64":
                yield [b'"%b"' % b64encode(entry.vector if entry.unit else unit_vector(entry)) for entry in chunk]
            else:
                yield [entry.ready or self._render(entry) for entry in chunk]

    def _render(self, entry: Entry) -> bytes:
        row = orjson.dumps(np.frombuffer(unit_vector(entry), _FLOATS), option=orjson.OPT_SERIALIZE_NUMPY)
        self._made += 1
        if self._made % KEEP_ONE_IN == 0:
            self._keep(entry, row)
        return row

    def _keep(self, entry: Entry, row: bytes) -> None:
        entry.ready = bytes(memoryview(row))  # of its own size: orjson leaves a hole behind what it returns
        self._ready.append(entry)
        self.ready_bytes += len(row)
        while self.ready_bytes > self._max_ready_bytes:
            oldest = self._ready.popleft()
            self.ready_bytes -= len(oldest.ready or b"")
            oldest.ready = None
