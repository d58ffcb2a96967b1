"""Retries: when a call is repeated, on which replica, and which replica is to blame.

The gateway alone repeats work that was sent (HAProxy repeats only connections that failed). A call is repeated once, if
another replica may do better (`Broken`), within the time of its callers and within a budget, so that an outage is never
multiplied. A dead replica refuses the next connection, so the repetition lands elsewhere by itself. A replica that
answered with a reply that cannot be used is avoided by name, and ejected after several in a row (ejection.py).
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from embedding_service.observability.log_throttle import LogThrottle
from embedding_service.upstream.calls import Broken

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from embedding_common.contract import Embedded
    from embedding_service.errors import Problem
    from embedding_service.observability.metrics import Metrics
    from embedding_service.upstream.calls import EmbedCall
    from embedding_service.upstream.ejection import Ejections

log = logging.getLogger(__name__)

RETRY_BUDGET = 10.0  # repetitions that may be saved up
RETRY_EARNED = 0.1  # saved up per call: in the long run at most one call in ten is a repetition
RETRY_PAUSE_S = 0.1
"""A killed process may close its connections some milliseconds before its listening socket (measured: up to 3 ms). A
repetition within them is accepted and lost too, since leastconn prefers a replica that has nothing in hand."""


class Retry:
    """The budget of repetitions, and the judgement of replicas by their replies.

    A call that succeeds visits nothing here: it only adds to `calls`, from which the budget is earned when it is asked
    for.
    """

    def __init__(self, *, ejections: Ejections, metrics: Metrics, pause_s: float = RETRY_PAUSE_S) -> None:
        self.calls = 0
        self.ejections = ejections
        self._metrics = metrics
        self._pause_s = pause_s
        self._saved = RETRY_BUDGET
        self._earned_up_to = 0
        self._log_spent = LogThrottle(log.warning)
        self._log_repeated = LogThrottle(log.info)

    def __repr__(self) -> str:
        return f"<Retry {self.budget:.1f} of {RETRY_BUDGET:.0f} repetitions saved, {self.ejections!r}>"

    @property
    def budget(self) -> float:
        """The repetitions that may be made now."""
        earned = RETRY_EARNED * (self.calls - self._earned_up_to)
        self._earned_up_to = self.calls
        self._saved = min(RETRY_BUDGET, self._saved + earned)
        return self._saved

    def choose(self, *, repeatable: bool) -> str | None:
        """The replica that a first call names while some are ejected, or None: HAProxy chooses.

        A call that could be repeated may try an ejected replica. `ejections.done` must follow if there is a name.
        """
        return self.ejections.choose(may_try=repeatable and self.budget >= 1)

    async def repeat(
        self, call: EmbedCall, failed: Broken, send: Callable[[EmbedCall, str | None], Awaitable[Embedded]]
    ) -> Embedded:
        """Sends `call` once more, to a replica other than the one that failed. Raises `Problem`."""
        self._spend(failed.problem)
        if failed.replica is None:
            await asyncio.sleep(self._pause_s)
        named = self.ejections.choose(avoid=failed.replica)
        try:
            embedded = await send(call, named)
        except Broken as again:
            raise again.problem from None
        if failed.replica is not None and failed.in_doubt:  # another replica could do it: the fault was not the work's
            self.blame(failed.replica)
        return embedded

    def blame(self, replica: str) -> None:
        """Notes that `replica` answered with a reply that cannot be used."""
        self._metrics.unusable_replies.inc()
        self.ejections.unusable(replica)

    def _spend(self, problem: Problem) -> None:
        """Takes one repetition from the budget. Raises `problem` if there is none."""
        if self.budget < 1:
            self._log_spent("not repeated, the retry budget is used up: %s", problem.message)
            raise problem from None
        self._saved -= 1
        self._metrics.upstream_retries.inc()
        self._log_repeated("repeating a call on another replica: %s", problem.message)
