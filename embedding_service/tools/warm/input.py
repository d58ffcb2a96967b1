"""Reads a file or stream into batches of texts. Memory holds at most one chunk, one line and one batch at a time."""

from __future__ import annotations

import asyncio
import codecs
import hashlib
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import orjson

from embedding_service.tools.client.options import Misuse

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    import numpy as np
    from numpy.typing import NDArray

CHUNK_BYTES = 256 * 1024
MAX_LINE_BYTES = 8 * 1024 * 1024  # far above what any model reads; keeps a file without newlines out of memory
MAX_BATCH_BYTES = 4 * 1024 * 1024  # an eighth of the service's default MAX_BODY_BYTES
HEAD_BYTES = 64 * 1024  # of the start of the file, whose digest recognises the file


@dataclass(slots=True)
class Entry:
    """One text of the file.

    After its request it has an error or a vector; without --out it has no vector.
    """

    line: int
    text: str = ""
    error: str | None = None
    vector: NDArray[np.float32] | None = None


@dataclass(slots=True)
class Batch:
    """Consecutive lines of the file, and where they end. `cached` and `model` are known after its request."""

    entries: list[Entry] = field(default_factory=list)
    blank: int = 0
    text_bytes: int = 0
    end_bytes: int = 0
    end_line: int = 0
    cached: int = 0
    model: str | None = None

    def take(self, line: RawLine, entry: Entry | None) -> None:
        self.end_bytes, self.end_line = line.end_bytes, line.number
        if entry is None:
            self.blank += 1
        else:
            self.entries.append(entry)
            self.text_bytes += len(line.data or b"")


@dataclass(frozen=True, slots=True)
class RawLine:
    """A line without its newline; `data` is None if the line is too long to be kept."""

    number: int
    end_bytes: int
    data: bytes | None


class LineCutter:
    """Cuts chunks into lines. It holds at most one chunk and one line of `MAX_LINE_BYTES`."""

    def __init__(self, *, offset_bytes: int = 0, number: int = 0) -> None:
        self._offset_bytes = offset_bytes
        self._number = number
        self._rest = b""
        self._dropped_bytes = 0

    def feed(self, chunk: bytes) -> list[RawLine]:
        *whole, self._rest = (self._rest + chunk).split(b"\n")
        lines = [self._line(data, len(data) + 1) for data in whole]
        if len(self._rest) > MAX_LINE_BYTES:
            self._dropped_bytes += len(self._rest)
            self._rest = b""
        return lines

    def end(self) -> list[RawLine]:
        """Returns the last line, if no newline ends it."""
        if not self._rest and not self._dropped_bytes:
            return []
        return [self._line(self._rest, len(self._rest))]

    def _line(self, data: bytes, taken_bytes: int) -> RawLine:
        too_long = self._dropped_bytes > 0 or len(data) > MAX_LINE_BYTES
        self._offset_bytes += self._dropped_bytes + taken_bytes
        self._number += 1
        self._dropped_bytes = 0
        if self._number == 1:
            data = data.removeprefix(codecs.BOM_UTF8)
        return RawLine(self._number, self._offset_bytes, None if too_long else data.removesuffix(b"\r"))


class Decoder:
    """Turns lines into entries. If no format is given, the first line that is not blank decides it."""

    def __init__(self, line_format: str | None, field_name: str) -> None:
        self.format = line_format
        self._field = field_name

    def entry(self, line: RawLine) -> Entry | None:
        """Returns None for a blank line."""
        if line.data is None:
            return Entry(line.number, error=f"longer than {MAX_LINE_BYTES} bytes")
        if not line.data.strip():
            return None
        try:
            return Entry(line.number, self._text(line.data))
        except ValueError as problem:
            return Entry(line.number, error=str(problem))

    def _text(self, data: bytes) -> str:
        if self.format is None:
            self.format = sniff_format(data)
        if self.format == "jsonl":
            return _json_text(data, self._field)
        try:
            return data.decode()
        except UnicodeDecodeError as problem:
            raise ValueError(f"not UTF-8: byte 0x{data[problem.start]:02x} at column {problem.start + 1}") from None


def sniff_format(first_line: bytes) -> str:
    try:
        value = orjson.loads(first_line)
    except ValueError:
        return "text"
    return "jsonl" if isinstance(value, str | dict) else "text"


def format_of_name(name: str) -> str | None:
    return {".txt": "text", ".jsonl": "jsonl", ".ndjson": "jsonl"}.get(Path(name).suffix.lower())


def _json_text(data: bytes, field_name: str) -> str:
    try:
        value = orjson.loads(data)
    except ValueError as problem:
        raise ValueError(f"not JSON: {problem}") from None
    if isinstance(value, dict):
        if field_name not in value:
            raise ValueError(f"no field {field_name!r}")
        value = value[field_name]
    if not isinstance(value, str):
        raise ValueError(f"not a string but {type(value).__name__}")  # noqa: TRY004 - bad input, not a bad call
    return value


class Source:
    """The input: a regular file, which a later run can resume, or a stream, which it cannot."""

    def __init__(self, name: str) -> None:
        try:
            self._file: BinaryIO = open(0 if name == "-" else name, "rb", buffering=0, closefd=name != "-")  # noqa: SIM115 - Path cannot open a descriptor; closed in close()
            self._status = os.fstat(self._file.fileno())
        except OSError as problem:
            raise Misuse(f"{name}: {(problem.strerror or str(problem)).lower()}") from None
        self.resumable = stat.S_ISREG(self._status.st_mode) and name != "-"
        self.size_bytes = self._status.st_size if self.resumable else None

    def identity(self) -> dict[str, Any]:
        """Returns what recognises the file: two files are taken for one if size, time and first bytes are equal."""
        head = os.pread(self._file.fileno(), HEAD_BYTES, 0)
        digest = hashlib.sha256(head).hexdigest()
        return {"size_bytes": self._status.st_size, "mtime_ns": self._status.st_mtime_ns, "head_sha256": digest}

    def close(self) -> None:
        self._file.close()

    async def chunks(self, offset_bytes: int) -> AsyncIterator[bytes]:
        if offset_bytes:
            self._file.seek(offset_bytes)
        while True:
            await self._readable()
            chunk = self._file.read(CHUNK_BYTES)
            if not chunk:
                return
            yield chunk

    async def _readable(self) -> None:
        """Waits for a pipe or terminal without blocking the event loop: requests go on, and Ctrl-C is handled."""
        if self.resumable:
            return
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        try:
            loop.add_reader(self._file.fileno(), _resolve, ready)
        except PermissionError:
            return  # epoll refuses files that are always ready: regular files, /dev/null
        try:
            await ready
        finally:
            loop.remove_reader(self._file.fileno())


def _resolve(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


async def read_batches(
    source: Source, decoder: Decoder, *, texts: int, offset_bytes: int, line: int
) -> AsyncGenerator[Batch, None]:
    cutter = LineCutter(offset_bytes=offset_bytes, number=line)
    batch = Batch()
    async for raw in _raw_lines(source, cutter, offset_bytes):
        batch.take(raw, decoder.entry(raw))
        if len(batch.entries) >= texts or batch.text_bytes >= MAX_BATCH_BYTES:
            yield batch
            batch = Batch()
    if batch.end_line:
        yield batch


async def _raw_lines(source: Source, cutter: LineCutter, offset_bytes: int) -> AsyncIterator[RawLine]:
    async for chunk in source.chunks(offset_bytes):
        for line in cutter.feed(chunk):
            yield line
    for line in cutter.end():
        yield line
