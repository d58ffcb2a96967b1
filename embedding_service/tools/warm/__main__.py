"""Sends the texts of a file through the service, so that its caches know them, and writes the vectors if asked to.

A run is one pass: bytes become lines, lines become batches, and each batch is one request. Several requests are under
way at a time, but batches are committed strictly in the order of the file. Therefore one byte offset says how far a
run came, and a resumed run needs nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import sys
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from embedding_service.tools.client.options import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, Misuse
from embedding_service.tools.warm.display import Display, final_line, open_display
from embedding_service.tools.warm.input import Batch, Decoder, Entry, Source, format_of_name, read_batches
from embedding_service.tools.warm.options import Settings, parse_arguments
from embedding_service.tools.warm.output import OUTPUTS, Progress, Sidecar, part_of
from embedding_service.tools.warm.service import Service, Stopped, open_service

if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAM = "embedding-warm"
WINDOW_BATCHES = 4  # per request under way: how far the fastest may be ahead of the slowest before it must wait
CHECKPOINT_S = 1.0  # between two writes of the progress file
MAX_REPORTED_FAILURES = 20


class Run:
    """One pass over the source. It outlives the event loop, so its figures can be reported however the loop ended."""

    def __init__(self, settings: Settings, source: Source, display: Display) -> None:
        self._settings = settings
        self._source = source
        self._display = display
        self._sidecar = self._open_sidecar()
        self.earlier = self._resume_from()
        self.progress = replace(self.earlier)
        self._complete = False
        self._output = OUTPUTS[settings.out.suffix](settings.out, self.earlier.out_bytes) if settings.out else None
        line_format = self.earlier.format or settings.format or format_of_name(settings.file)
        self._decoder = Decoder(line_format, settings.field)
        self._reported_failures = 0
        self._halted = False  # true after a batch that failed to commit: a later one would leave a gap in the output
        self._begun_s = time.monotonic()
        self._saved_s = -math.inf

    def _open_sidecar(self) -> Sidecar | None:
        if not self._source.resumable:
            return None
        path = self._settings.state or Path(f"{self._settings.file}.warm_cache.json")
        return Sidecar(path, {"file": self._source.identity(), "settings": self._settings.identity()})

    def _resume_from(self) -> Progress:
        """Returns where an earlier run stopped, or the start.

        The earlier run counts if it had the same file and settings, and its vectors still exist.
        """
        if self._sidecar is None or self._settings.restart or not self._sidecar.exists():
            return Progress()
        saved = self._sidecar.load()
        if saved is None:
            self._display.say("the progress file belongs to another FILE or other settings: starting over")
        elif self._settings.out and _size_bytes(part_of(self._settings.out)) < saved.out_bytes:
            self._display.say(f"{part_of(self._settings.out)} is gone or cut short: starting over")
        else:
            self._display.say(f"resuming after line {saved.line:,}: {saved.texts:,} texts are done")
            return saved
        return Progress()

    @property
    def _seconds(self) -> float:
        return max(time.monotonic() - self._begun_s, 1e-9)

    async def run(self) -> None:
        window: deque[asyncio.Task[Batch]] = deque()
        async with open_service(self._settings) as service:
            self._begun_s = time.monotonic()
            if self._output is not None:
                self._output.begin()
            self._save()  # now, so that a file that cannot be written is reported before the work is done
            try:
                await self._send_all(service, window)
            finally:
                await self._settle(window)
            self._finish()

    async def _send_all(self, service: Service, window: deque[asyncio.Task[Batch]]) -> None:
        batches = read_batches(
            self._source,
            self._decoder,
            texts=self._settings.batch,
            offset_bytes=self.earlier.offset_bytes,
            line=self.earlier.line,
        )
        async with contextlib.aclosing(batches):
            async for batch in batches:
                if len(window) >= WINDOW_BATCHES * self._settings.concurrency:
                    await self._commit_first(window)
                window.append(asyncio.create_task(service.fill(batch)))
                while window and window[0].done():
                    self._commit_done(window)
                # a file is always ready to be read: without this pause no request would start before the window is full
                await asyncio.sleep(0)
        while window:
            await self._commit_first(window)

    async def _commit_first(self, window: deque[asyncio.Task[Batch]]) -> None:
        await asyncio.wait([window[0]])  # not the task itself: a cancellation of this wait would cancel it too
        self._commit_done(window)

    def _commit_done(self, window: deque[asyncio.Task[Batch]]) -> None:
        self._halted = True
        self._commit(window.popleft().result())
        self._halted = False

    async def _settle(self, window: deque[asyncio.Task[Batch]]) -> None:
        """Commits the batches that are done in order and drops the others, which the next run sends again."""
        try:
            while not self._halted and window and window[0].done() and window[0].exception() is None:
                self._commit_done(window)
        finally:
            for task in window:
                task.cancel()
            await asyncio.gather(*window, return_exceptions=True)
            self._save()

    def _commit(self, batch: Batch) -> None:
        self._check_model(batch)
        for entry in batch.entries:
            self._report_failure(entry)
        if self._output is not None:
            self._output.write(batch.entries, self.progress)
        progress = self.progress = self._advanced(batch)  # one assignment: a second Ctrl-C may come at any moment
        self._display.update(progress, (progress.texts - self.earlier.texts) / self._seconds)
        if time.monotonic() - self._saved_s >= CHECKPOINT_S:
            self._save()

    def _advanced(self, batch: Batch) -> Progress:
        before = self.progress
        return replace(
            before,
            offset_bytes=batch.end_bytes,
            line=batch.end_line,
            texts=before.texts + len(batch.entries),
            failed=before.failed + sum(entry.error is not None for entry in batch.entries),
            cached=before.cached + batch.cached,
            blank=before.blank + batch.blank,
            format=self._decoder.format,
            out_bytes=self._output.position_bytes if self._output else 0,
        )

    def _check_model(self, batch: Batch) -> None:
        """Raises `Misuse` if a batch has vectors of another model: one file holds the vectors of one model."""
        progress = self.progress
        found = next((len(entry.vector) for entry in batch.entries if entry.vector is not None), None)
        model, dimension = progress.model or batch.model, progress.dimension or found
        if self._output is not None and ((batch.model or model) != model or (found or dimension) != dimension):
            raise Misuse(
                f"the vectors so far are of {model} ({dimension}), the service now answers with {batch.model} ({found})"
                ": --restart begins again"
            )
        progress.model, progress.dimension = model, dimension

    def _report_failure(self, entry: Entry) -> None:
        if entry.error is None:
            return
        if self._settings.strict:
            raise Stopped(f"line {entry.line}: {entry.error}")
        self._reported_failures += 1
        if self._reported_failures <= MAX_REPORTED_FAILURES:
            self._display.say(f"line {entry.line}: {entry.error}")
        elif self._reported_failures == MAX_REPORTED_FAILURES + 1:
            self._display.say("more failures follow; they are only counted")

    def _save(self) -> None:
        if self._output is not None:
            self._output.flush()  # first: the progress file must not count vectors that are not written
        if self._sidecar is not None:
            self._sidecar.save(self.progress)
        self._saved_s = time.monotonic()

    def _finish(self) -> None:
        if self._output is not None:
            self._output.finish(self.progress)
        if self._sidecar is not None:
            self._sidecar.remove()
        self._complete = True

    def close(self) -> None:
        if self._output is not None:
            self._output.close()

    def summary(self) -> dict[str, Any]:
        """Returns the figures of this run; those under `earlier` are of the runs that it resumed."""
        done, before, seconds = self.progress, self.earlier, self._seconds
        texts, cached, failed = done.texts - before.texts, done.cached - before.cached, done.failed - before.failed
        return {
            "complete": self._complete,
            "texts": texts,
            "seconds": round(seconds, 3),
            "texts_per_s": round(texts / seconds, 1),
            "cached": cached,
            "cached_share": round(cached / texts, 4) if texts else 0.0,
            "computed": texts - cached - failed,
            "failed": failed,
            "blank_lines": done.blank - before.blank,
            "line": done.line,
            "earlier": {"texts": before.texts, "cached": before.cached, "failed": before.failed},
            "resumable": self._sidecar is not None and not self._complete,
        }


def _size_bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def main(arguments: Sequence[str] | None = None, *, program: str = PROGRAM) -> int:
    """Runs the tool and returns its exit code. `arguments` are those of the process by default.

    `program` is the name in the help and in front of messages.
    """
    settings = parse_arguments(arguments, program=program)
    with contextlib.ExitStack() as cleanup:
        try:
            source = Source(settings.file)
            cleanup.callback(source.close)
            display = open_display(quiet=settings.quiet, total_bytes=source.size_bytes)
            cleanup.callback(display.close)
            run = Run(settings, source, display)
            cleanup.callback(run.close)
        except Misuse as misuse:
            print(f"{program}: {misuse}", file=sys.stderr)
            return EXIT_USAGE
        code = _exit_code(run, display, program)
        display.close()  # first: the final line belongs below the bar
        if code != EXIT_USAGE:
            summary = run.summary()
            print(orjson.dumps(summary).decode() if settings.json else final_line(summary))
    return code


def _exit_code(run: Run, display: Display, program: str) -> int:
    try:
        asyncio.run(run.run())
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Misuse as misuse:
        display.say(f"{program}: {misuse}")
        return EXIT_USAGE
    except (Stopped, OSError) as problem:  # OSError: the disk is full, or the file cannot be read any more
        display.say(f"{program}: {problem}")
        return EXIT_FAILED
    return EXIT_FAILED if run.progress.failed else 0


def command(program: str = PROGRAM) -> None:
    """Runs the tool as a program of its own, with the arguments of the process, and ends the process."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the program without a traceback
    sys.exit(main(program=program))


if __name__ == "__main__":
    command()
