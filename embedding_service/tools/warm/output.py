"""The files that a run writes: its progress, and the vectors. The next run continues both where a run was stopped."""

from __future__ import annotations

import fcntl
import os
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from embedding_service.tools.client.options import Misuse

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from embedding_service.tools.warm.input import Entry


@dataclass(slots=True, kw_only=True)
class Progress:
    """What is committed. The next run reads on at `offset_bytes` and `line`, and writes on at `out_bytes`."""

    offset_bytes: int = 0
    line: int = 0
    texts: int = 0
    cached: int = 0
    failed: int = 0
    blank: int = 0
    format: str | None = None
    model: str | None = None
    dimension: int | None = None
    out_bytes: int = 0


class Sidecar:
    """The progress file. It is replaced in one step, so a crash leaves the old one or the new one."""

    def __init__(self, path: Path, key: dict[str, Any]) -> None:
        self._path = path
        self._key = key
        if path.exists() and not path.is_file():
            raise Misuse(f"{path}: not a regular file")

    def load(self) -> Progress | None:
        """Returns None if there is no file, or the file belongs to another input or other settings."""
        try:
            saved = orjson.loads(self._path.read_bytes())
            return Progress(**saved["progress"]) if saved["key"] == self._key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def exists(self) -> bool:
        return self._path.exists()

    def save(self, progress: Progress) -> None:
        new = self._path.with_name(self._path.name + ".new")
        try:
            new.write_bytes(orjson.dumps({"key": self._key, "progress": asdict(progress)}))
            new.replace(self._path)
        except OSError as problem:
            raise Misuse(f"{self._path}: {problem.strerror}; --state puts the progress file elsewhere") from None

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


class Output(ABC):
    """A file of vectors. They are written to `x.part`, which becomes `x` when all are written.

    `x.part` is locked against a second copy of this tool, and cut back to what is committed before it grows.
    """

    def __init__(self, path: Path, position_bytes: int) -> None:
        self._path = path
        self._part = part_of(path)
        self._position_bytes = position_bytes
        try:
            self.file = os.fdopen(os.open(self._part, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        except OSError as problem:
            raise Misuse(f"{self._part}: {problem.strerror}") from None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise Misuse(f"{self._part}: another copy of this script writes it") from None

    def begin(self) -> None:
        """Cuts off what is not committed, after the service has answered: a mistyped URL must cost no vectors."""
        self.file.truncate(self._position_bytes)
        self.file.seek(self._position_bytes)

    @abstractmethod
    def write(self, entries: Sequence[Entry], progress: Progress) -> None:
        """Appends one batch; `progress` does not count it yet."""

    @property
    def position_bytes(self) -> int:
        return self.file.tell()

    def flush(self) -> None:
        self.file.flush()

    def finish(self, progress: Progress) -> None:  # noqa: ARG002 - formats that begin with their size need it
        """Gives the file its name."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self._part.replace(self._path)
        self.file.close()

    def close(self) -> None:
        self.file.close()


def part_of(path: Path) -> Path:
    return path.with_name(path.name + ".part")


class NpyOutput(Output):
    """An array float32 [texts, dimension].

    NumPy pads the headers of arrays that grow to one length, so the last header overwrites the first.
    """

    def write(self, entries: Sequence[Entry], progress: Progress) -> None:
        if progress.dimension is None:
            return  # only failures so far: their rows follow the header
        if self.file.tell() == 0:
            self._write_header(0, progress.dimension)
            self._write_failed(progress.texts, progress.dimension)
        rows = np.full((len(entries), progress.dimension), np.nan, "<f4")
        for row, entry in zip(rows, entries, strict=True):
            if entry.vector is not None:
                row[:] = entry.vector
        self.file.write(rows.tobytes())

    def finish(self, progress: Progress) -> None:
        self.file.seek(0)
        self._write_header(progress.texts, progress.dimension or 0)
        super().finish(progress)

    def _write_header(self, rows: int, dimension: int) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, dimension)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def _write_failed(self, rows: int, dimension: int) -> None:
        row = np.full(dimension, np.nan, "<f4").tobytes()
        for _ in range(rows):
            self.file.write(row)


class JsonLinesOutput(Output):
    """One JSON object for each text."""

    def write(self, entries: Sequence[Entry], progress: Progress) -> None:  # noqa: ARG002 - no line depends on another
        for entry in entries:
            fields: dict[str, Any] = {"line": entry.line, "embedding": entry.vector}
            if entry.error is not None:
                fields["error"] = entry.error
            self.file.write(orjson.dumps(fields, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))


OUTPUTS: dict[str, type[Output]] = {".npy": NpyOutput, ".jsonl": JsonLinesOutput}
