#!/usr/bin/env python3
"""Checks a running system against its targets and says, target by target, whether it meets them.

The order of the run: health, one request, a concurrent load of texts nobody has sent before, the same load again
(now from the cache), and last HAProxy's own figures: which replicas answered while that went on.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from typing import TYPE_CHECKING

try:
    import aiohttp
    from client_http import open_session
    from client_options import EXIT_FAILED, EXIT_INTERRUPTED
    from scaling_checks import Validation
    from scaling_options import Settings, parse_arguments
    from scaling_report import Report
except ModuleNotFoundError as missing:  # started with a Python that is not the project's
    print(
        f"validate_scaling.py: no module {missing.name} here: run it with the Python of the project's environment",
        file=sys.stderr,
    )
    sys.exit(2)

if TYPE_CHECKING:
    from collections.abc import Sequence


async def validate(settings: Settings, report: Report) -> None:
    timeout = aiohttp.ClientTimeout(total=settings.timeout_s)
    async with open_session(concurrency=settings.concurrency, timeout=timeout, api_key=settings.api_key) as session:
        await Validation(settings, session, report).run()


def main(arguments: Sequence[str] | None = None) -> int:
    settings = parse_arguments(arguments)
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


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it, without a traceback
    sys.exit(main())
