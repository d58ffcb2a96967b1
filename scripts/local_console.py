"""What the local stack prints: where things are, and what the parts write to their logs."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from local_part import Part

LOG_LIMIT_BYTES = 64 << 20
"""Then a log is moved aside once: a line or two a request under load would else fill a disk in days."""


def tell(line: str) -> None:
    """Prints, also after the reader has gone: Ctrl-C ends `| tee` before us, and that must not end us halfway."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError:
        pass  # the disk is full, the terminal gone: the line is lost, the service goes on


class Console:
    """Prints what the parts write to their logs, each line behind the part's name."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._width = max(len(part.name) for part in parts)
        self._read_bytes = dict.fromkeys(parts, 0)

    def say(self, name: str, line: str, colour: int = 36) -> None:
        label = f"{name:<{self._width}}"
        tell(f"\x1b[{colour}m{label}\x1b[0m {line}" if self._colour else f"{label} {line}")

    def skip(self) -> None:
        """What has been written so far is not printed: while a stack warms, HAProxy reports every server as down."""
        for part in self._read_bytes:
            with contextlib.suppress(OSError):
                self._read_bytes[part] = part.log_path.stat().st_size

    def follow(self) -> None:
        """What came since the last call. A log past its limit moves aside; parts append, so none loses its place."""
        for number, part in enumerate(self._read_bytes):
            with contextlib.suppress(OSError):  # somebody removed it, or the disk is full: the parts run on
                self._follow(part, 31 + number % 6)

    def _follow(self, part: Part, colour: int) -> None:
        if part.log_path.stat().st_size < self._read_bytes[part]:
            self._read_bytes[part] = 0  # somebody emptied it
        with part.log_path.open("rb") as log:
            log.seek(self._read_bytes[part])
            whole_lines = log.read().rpartition(b"\n")[0]
        if whole_lines:
            self._read_bytes[part] += len(whole_lines) + 1
            for line in whole_lines.decode(errors="replace").splitlines():
                self.say(part.name, line, colour)
        if self._read_bytes[part] > LOG_LIMIT_BYTES:
            try:
                shutil.copyfile(part.log_path, part.log_path.with_suffix(".log.1"))
            finally:  # also without room for the copy, when it must not grow above all
                os.truncate(part.log_path, 0)
                self._read_bytes[part] = 0


def welcome(*, url: str, ml_url: str, stats_url: str, logs: Path) -> str:
    """Where to go from here."""
    return f"""
  Everything is up.

  gateway    {url}/embed      docs {url}/docs
  caches     {url}/cache/stats
  balancer   {ml_url}/embed      the replicas, uncached
  HAProxy    {stats_url}/stats
  logs       {logs}

  Try:  curl -s {url}/embed -H 'content-type: application/json' -d '{{"texts": ["hello world"]}}'

  Ctrl-C ends everything.
"""
