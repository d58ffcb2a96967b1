"""API keys, for gateway and replicas: read from a setting or a file, looked up in constant time."""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

MAX_SECRET_BYTES = 1 << 16  # the most that is read of a file of keys, in case its path names a device or other data
_BEARER = b"bearer "


class Keys:
    """A set of keys. If it is empty, nothing is locked.

    Keys are kept and looked up as digests under a random key of this process: how long a look-up takes depends on
    digests that no caller can know, and a dump of this object holds no key.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._salt = secrets.token_bytes(32)
        self._digests = frozenset(self._digest(key.encode()) for key in keys)

    def __repr__(self) -> str:
        return f"<Keys {len(self._digests)}>"

    def __len__(self) -> int:
        return len(self._digests)

    def __contains__(self, key: bytes) -> bool:
        return self._digest(key) in self._digests

    def _digest(self, key: bytes) -> bytes:
        return hashlib.blake2b(key, key=self._salt, digest_size=32).digest()


def parse_keys(text: str) -> tuple[str, ...]:
    """Returns the keys in a comma or line separated list. Raises `ValueError`, whose message holds none of them."""
    keys = tuple(text.replace(",", " ").split())
    if not keys:
        raise ValueError("is set, but holds no key")
    if not all(key.isascii() and key.isprintable() for key in keys):
        raise ValueError("a key must be of printable ASCII characters")
    return keys


def bearer(scope: Mapping[str, Any]) -> bytes | None:
    """Returns the key in `Authorization: Bearer ...`, or None."""
    for name, value in scope["headers"]:
        if name == b"authorization":
            given: bytes = value
            return given[len(_BEARER) :].strip() if given[: len(_BEARER)].lower() == _BEARER else None
    return None


def secrets_from_files(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Returns `values`, with each secret NAME that is given as NAME_FILE read from that file, without its line end.

    Raises `ValueError` with one line: a file that is missing or empty must not leave the service open.
    """
    read = dict(values)
    for name in names:
        path = values.get(f"{name}_FILE")
        if not path:
            continue
        if values.get(name):
            raise ValueError(f"{name} and {name}_FILE are both set")
        try:
            with Path(path).open("rb") as file:
                secret = file.read(MAX_SECRET_BYTES).decode().strip()
        except (OSError, UnicodeDecodeError) as problem:
            why = problem.strerror if isinstance(problem, OSError) else "it is not UTF-8"
            raise ValueError(f"{name}_FILE: cannot read {path}: {why}") from None
        if not secret:
            raise ValueError(f"{name}_FILE: {path} is empty")
        read[name] = secret
    return read
