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

    from local_stack.part import Part

LOG_LIMIT_BYTES = 64 << 20
"""A longer log is moved aside. Without that, one or two lines for each request would fill a disk in days of load."""


def tell(line: str) -> None:
    """Prints a line, and survives a closed pipe: Ctrl-C ends `| tee` first, which must not interrupt our shutdown."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError:
        pass  # the disk is full or the terminal is closed: the line is lost, the service goes on


class Console:
    """Prints what the parts write to their logs. The name of the part stands in front of each line."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._width = max(len(part.name) for part in parts)
        self._read_bytes = dict.fromkeys(parts, 0)

    def say(self, name: str, line: str, colour: int = 36) -> None:
        label = f"{name:<{self._width}}"
        tell(f"\x1b[{colour}m{label}\x1b[0m {line}" if self._colour else f"{label} {line}")

    def skip(self) -> None:
        """Skips what the logs hold so far: while a stack warms up, HAProxy reports every server as down."""
        for part in self._read_bytes:
            with contextlib.suppress(OSError):
                self._read_bytes[part] = part.log_path.stat().st_size

    def follow(self) -> None:
        """Prints what came since the last call. A log past its limit moves aside; parts append, so they write on."""
        for number, part in enumerate(self._read_bytes):
            with contextlib.suppress(OSError):  # it was removed, or the disk is full: the parts run on
                self._follow(part, 31 + number % 6)

    def _follow(self, part: Part, colour: int) -> None:
        if part.log_path.stat().st_size < self._read_bytes[part]:
            self._read_bytes[part] = 0  # it was emptied from outside
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
            finally:  # also if the disk has no room for the copy: then the log must not grow either
                os.truncate(part.log_path, 0)
                self._read_bytes[part] = 0


def welcome(*, url: str, ml_url: str, stats_url: str, logs: Path) -> str:
    """Returns the addresses of a stack that is up, and an example of a request."""
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
