"""The cached entry: one model vector with its header, and the key it is found under. Pure; standard library only.

An entry as stored (little-endian, 24 bytes of header, then the vector):

    magic "EV" | version u8 | flags u8 (bit 0: truncated) | dimension u32 | tokens u32 | crc u32 | expires_at f64
    vector float32[dimension]: the model's own output at full dimension

`tokens` counts the text before truncation. `expires_at` is in seconds of the Unix clock. `crc` is CRC-32 (ISO 3309,
as in zlib) over the key, the header with a crc of 0, and the vector: bytes that were flipped, cut, or stored under
another text's key fail it, and an entry that fails is a miss. Requests' `normalize`, `dimensions`, `truncate` and
encoding are applied on reading, so that one entry serves every variant.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_HEADER = struct.Struct("<2sBBIIId")
_MAGIC = b"EV"
_VERSION = 1
_TRUNCATED = 1
_FLOAT_BYTES = 4

KEY_BYTES = 32
NAME_CHARS = 128
"""Up to this length a text is its own name in L1: exact, and a tenth of what a digest costs. A longer one would make L1
larger."""
_OVERHEAD_BYTES = 416  # name, Entry, ints, floats and their references in L1; measured by scripts/bench/l1_memory.py


@dataclass(slots=True)
class Entry:
    """One text's vector (float32, little-endian, as bytes) and what a reply must tell about it.

    The first four fields never change. The others are notes of two users: `api/render.py` keeps `ready`, the JSON made
    for an earlier reply, and `unit`, whether the vector has unit length, once that is known; `lru.py` keeps
    `fresh_until` and `used`. (An entry is not frozen, since that quadruples what making one costs.)
    """

    vector: bytes
    tokens: int
    truncated: bool
    expires_at: float
    ready: bytes | None = field(default=None, compare=False, repr=False)
    unit: bool | None = field(default=None, compare=False, repr=False)
    fresh_until: float = field(default=0.0, compare=False, repr=False)
    used: bool = field(default=False, compare=False, repr=False)

    @property
    def dimension(self) -> int:
        return len(self.vector) // _FLOAT_BYTES

    def size_bytes(self) -> int:
        """The memory that an entry holds: its vector, and the objects around it and its key."""
        return len(self.vector) + _OVERHEAD_BYTES


def pack(key: bytes, entry: Entry) -> bytes:
    """`entry` as it is stored under `key`."""
    flags = _TRUNCATED if entry.truncated else 0
    return _header(key, flags, entry.tokens, entry.expires_at, entry.vector) + entry.vector


def unpack(key: bytes, stored: bytes) -> Entry | None:
    """The entry in `stored`, or None if it is foreign, of another version, or damaged in any bit."""
    if len(stored) < _HEADER.size:
        return None
    magic, version, flags, _, tokens, _, expires_at = _HEADER.unpack_from(stored)
    if magic != _MAGIC or version != _VERSION:
        return None
    vector = stored[_HEADER.size :]
    if _header(key, flags, tokens, expires_at, vector) != stored[: _HEADER.size]:
        return None
    return Entry(vector, tokens, bool(flags & _TRUNCATED), expires_at)


def _header(key: bytes, flags: int, tokens: int, expires_at: float, vector: bytes) -> bytes:
    dimension, rest = divmod(len(vector), _FLOAT_BYTES)
    if rest:
        return b""  # no header fits a vector of broken floats
    unsigned = _HEADER.pack(_MAGIC, _VERSION, flags, dimension, tokens, 0, expires_at)
    crc = zlib.crc32(vector, zlib.crc32(unsigned, zlib.crc32(key)))
    return _HEADER.pack(_MAGIC, _VERSION, flags, dimension, tokens, crc, expires_at)


class KeySpace:
    """The keys of all texts under one fingerprint, prompt and truncation side.

    The key is the full 256-bit BLAKE2b digest (RFC 7693) of all that decides a vector. Each part but the last is
    preceded by its length, so no two different requests feed the hash the same bytes.

    L1 knows a text by its name, which holds within one process only: the text itself behind a mark that no other
    space of the process has, or the key of a text that is too long for that.
    """

    __slots__ = ("_mark", "_prefix", "direction", "fingerprint", "model_id", "prompt", "prompt_name")

    _numbers: ClassVar[Iterator[int]] = count()

    def __init__(
        self, *, model_id: str, fingerprint: str, prompt_name: str | None, prompt: str, direction: str
    ) -> None:
        self.model_id = model_id
        self.fingerprint = fingerprint
        self.prompt_name = prompt_name
        self.prompt = prompt
        self.direction = direction
        self._prefix = hashlib.blake2b(digest_size=KEY_BYTES)
        for part in (fingerprint, prompt, direction):
            raw = part.encode()
            self._prefix.update(len(raw).to_bytes(8, "little") + raw)
        self._mark = f"{next(self._numbers)}:"  # none begins another

    def covers(self, *, fingerprint: str, prompt: str) -> bool:
        """Whether what such a model computes with such a prompt belongs under our keys."""
        return fingerprint == self.fingerprint and prompt == self.prompt

    def names(self, texts: Sequence[str]) -> Sequence[str | bytes]:
        """The name of each text in L1, for at least one text; equal for equal texts only."""
        mark = self._mark
        if max(map(len, texts)) <= NAME_CHARS:
            return [mark + text for text in texts]
        return [mark + text if len(text) <= NAME_CHARS else self.key(text) for text in texts]

    def name(self, text: str) -> str | bytes:
        return self.names((text,))[0]

    def keys(self, texts: Iterable[str]) -> list[bytes]:
        """`KEY_BYTES` bytes for each text; equal for equal texts only."""
        copy = self._prefix.copy
        keys = []
        for text in texts:
            digest = copy()
            digest.update(text.encode())
            keys.append(digest.digest())
        return keys

    def key(self, text: str) -> bytes:
        return self.keys((text,))[0]
