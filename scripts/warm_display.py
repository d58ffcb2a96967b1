"""What a person sees of a run: the bar, the messages, the final line."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from warm_output import Progress


class Display(Protocol):
    def say(self, line: str) -> None: ...
    def update(self, progress: Progress, texts_per_s: float) -> None: ...
    def close(self) -> None: ...


class PlainDisplay:
    """Lines on standard error, no bar."""

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    def update(self, progress: Progress, texts_per_s: float) -> None: ...

    def close(self) -> None: ...


class BarDisplay:
    """A bar over the bytes of a file, whose texts nobody has counted yet; over a stream it only shows that it moves."""

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
        hits = progress.cached / max(1, progress.texts)
        self._bar.update(self._task, completed=progress.offset_bytes, rate=texts_per_s, hits=hits)

    def close(self) -> None:
        self._bar.stop()


def open_display(*, quiet: bool, total_bytes: int | None) -> Display:
    if quiet or not sys.stderr.isatty():
        return PlainDisplay()
    try:
        return BarDisplay(total_bytes=total_bytes)
    except ImportError:
        plain = PlainDisplay()
        plain.say("no progress bar without rich: pip install 'rich>=13.9'")
        return plain


def final_line(told: dict[str, Any]) -> str:
    line = (
        f"{told['texts']:,} texts in {told['seconds']:.1f} s, {told['texts_per_s']:,.0f} texts/s: "
        f"from cache {told['cached']:,} ({told['cached_share']:.1%}), computed {told['computed']:,}, "
        f"failed {told['failed']:,}"
    )
    if told["blank_lines"]:
        line += f"; {told['blank_lines']:,} blank lines skipped"
    if told["earlier"]["texts"]:
        line += f"; {told['earlier']['texts']:,} texts ({told['earlier']['failed']:,} failed) in earlier runs"
    if not told["complete"]:
        line += f"; stopped after line {told['line']:,}"
    if told["resumable"]:
        line += ", the same command goes on from there"
    return line
