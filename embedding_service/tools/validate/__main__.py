"""Checks a running system against its targets and says, target by target, whether it meets them.

The order of the run: health, one request, a concurrent load of texts that no cache holds, the same load again, which
the cache now answers, and at last HAProxy's figures, which tell which replicas answered meanwhile.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from typing import TYPE_CHECKING

import aiohttp

from embedding_service.tools.client.http import open_session
from embedding_service.tools.client.options import EXIT_FAILED, EXIT_INTERRUPTED
from embedding_service.tools.validate.checks import Validation
from embedding_service.tools.validate.options import parse_arguments
from embedding_service.tools.validate.report import Report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from embedding_service.tools.validate.options import Settings

PROGRAM = "embedding-validate"


async def validate(settings: Settings, report: Report) -> None:
    """Runs all checks into `report`."""
    timeout = aiohttp.ClientTimeout(total=settings.timeout_s)
    async with open_session(concurrency=settings.concurrency, timeout=timeout, api_key=settings.api_key) as session:
        await Validation(settings, session, report).run()


def main(arguments: Sequence[str] | None = None, *, program: str = PROGRAM) -> int:
    """Runs the tool and returns its exit code. `arguments` are those of the process by default.

    `program` is the name in the help and in front of messages.
    """
    settings = parse_arguments(arguments, program=program)
    report = Report(as_json=settings.json)
    report.say(f"Validating {f'{settings.learn_url}/learn' if settings.learn_url else f'{settings.url}/embed'}")
    report.say(f"{settings.requests} requests of {settings.texts} texts, {settings.concurrency} at a time, twice\n")
    start_s = time.perf_counter()
    interrupted = False
    try:
        asyncio.run(validate(settings, report))
    except KeyboardInterrupt:
        interrupted = True
    report.finish(seconds=round(time.perf_counter() - start_s, 3), interrupted=interrupted)
    if interrupted:
        return EXIT_INTERRUPTED
    return 0 if report.passed else EXIT_FAILED


def command(program: str = PROGRAM) -> None:
    """Runs the tool as a program of its own, with the arguments of the process, and ends the process."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the program without a traceback
    sys.exit(main(program=program))


if __name__ == "__main__":
    command()
