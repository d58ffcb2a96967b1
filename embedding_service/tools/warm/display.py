"""What a person sees of a run: the progress, the messages, the final line."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from embedding_service.tools.warm.output import Progress

LINE_EVERY_S = 5.0  # between two lines of progress, if there is no bar


class Display(Protocol):
    """Where a run reports: `say` prints a message, `update` shows how far the run came."""

    def say(self, line: str) -> None: ...
    def update(self, progress: Progress, texts_per_s: float) -> None: ...
    def close(self) -> None: ...


class PlainDisplay:
    """Prints messages on standard error, and no progress."""

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def update(self, progress: Progress, texts_per_s: float) -> None: ...

    def close(self) -> None: ...


class LineDisplay(PlainDisplay):
    """Prints a line of progress on standard error every few seconds, for a terminal without `rich`."""

    def __init__(self, *, total_bytes: int | None) -> None:
        self._total_bytes = total_bytes
        self._next_s = time.monotonic() + LINE_EVERY_S

    def update(self, progress: Progress, texts_per_s: float) -> None:
        if time.monotonic() < self._next_s:
            return
        self._next_s = time.monotonic() + LINE_EVERY_S
        share = f" ({progress.offset_bytes / self._total_bytes:.0%})" if self._total_bytes else ""
        self.say(
            f"{progress.texts:,} texts{share}, {texts_per_s:,.0f} texts/s, {_cached_share(progress):.1%} from cache"
        )


class BarDisplay:
    """Shows a bar over the bytes of a file, because its texts are not counted yet.

    The size of a stream is unknown, so for a stream the bar only shows that the run goes on.
    """

    def __init__(self, *, total_bytes: int | None) -> None:
        from rich import progress  # noqa: PLC0415 - optional: only this class needs it
        from rich.console import Console  # noqa: PLC0415 - likewise

        self._bar = progress.Progress(
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            progress.TextColumn("{task.fields[rate]:,.0f} texts/s, {task.fields[hits]:.1%} from cache"),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("", total=total_bytes, rate=0.0, hits=0.0)
        self._bar.start()

    def say(self, line: str) -> None:
        self._bar.console.print(line, markup=False, highlight=False)

    def update(self, progress: Progress, texts_per_s: float) -> None:
        hits = _cached_share(progress)
        self._bar.update(self._task, completed=progress.offset_bytes, rate=texts_per_s, hits=hits)

    def close(self) -> None:
        self._bar.stop()


def open_display(*, quiet: bool, total_bytes: int | None) -> Display:
    """Returns a bar on a terminal, or lines of progress if `rich` is not installed; else messages only."""
    if quiet or not sys.stderr.isatty():
        return PlainDisplay()
    try:
        return BarDisplay(total_bytes=total_bytes)
    except ImportError:
        lines = LineDisplay(total_bytes=total_bytes)
        lines.say("no progress bar without rich: pip install 'rich>=13.9'")
        return lines


def _cached_share(progress: Progress) -> float:
    return progress.cached / max(1, progress.texts)


def final_line(summary: dict[str, Any]) -> str:
    """Returns the figures of `Run.summary` as one sentence."""
    line = (
        f"{summary['texts']:,} texts in {summary['seconds']:.1f} s, {summary['texts_per_s']:,.0f} texts/s: "
        f"from cache {summary['cached']:,} ({summary['cached_share']:.1%}), computed {summary['computed']:,}, "
        f"failed {summary['failed']:,}"
    )
    if summary["blank_lines"]:
        line += f"; {summary['blank_lines']:,} blank lines skipped"
    if summary["earlier"]["texts"]:
        line += f"; {summary['earlier']['texts']:,} texts ({summary['earlier']['failed']:,} failed) in earlier runs"
    if not summary["complete"]:
        line += f"; stopped after line {summary['line']:,}"
    if summary["resumable"]:
        line += ", the same command goes on from there"
    return line
