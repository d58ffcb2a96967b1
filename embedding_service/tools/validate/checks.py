"""The checks of `embedding-validate` in their order: what each sends, what it measures, and its verdict."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from embedding_service.tools.client.http import json_object
from embedding_service.tools.validate.load import (
    EmbedTarget,
    LearnTarget,
    Load,
    Refused,
    Target,
    Texts,
    exchange,
    refusal,
    send_load,
)
from embedding_service.tools.validate.options import MAX_LATENCY_MS, MIN_COSINE, MIN_HIT_RATE, MIN_SUCCESS, Settings
from embedding_service.tools.validate.replicas import Server, judge_replicas, parse_servers
from embedding_service.tools.validate.report import Check, Report

if TYPE_CHECKING:
    import aiohttp
    from numpy.typing import NDArray


class Counts(NamedTuple):
    """Texts that were asked for, and those of them that came from a cache."""

    texts: int
    hits: int


class Validation:
    """Runs the checks one after the other and adds each verdict to a report."""

    def __init__(self, settings: Settings, session: aiohttp.ClientSession, report: Report) -> None:
        self._settings = settings
        self._session = session
        self._report = report
        self._texts = Texts(settings.texts)
        self._target: Target = (
            LearnTarget(session, settings.learn_url) if settings.learn_url else EmbedTarget(session, settings.url)
        )
        # gateway and balancer may be out of reach of a caller that tries a storage server: then that fails nothing
        self._unreached = None if settings.learn_url else False

    async def run(self) -> None:
        reached = await self._check_health()
        if not reached and not self._settings.learn_url:
            self._report.say("      nothing else was tried")
            return
        servers_before = await self._servers()
        await self._check_one_request()
        first = await self._load()
        self._check_success(first)
        counted_before = await self._counts() if reached else None
        repeated = await self._load()
        counted_after = await self._counts() if reached else None
        self._check_repeated(first, repeated, _growth(counted_before, counted_after))
        self._check_same_vectors(first, repeated)
        self._check_replicas(servers_before, await self._servers())

    async def _load(self) -> Load:
        settings = self._settings
        return await send_load(self._target, self._texts, requests=settings.requests, concurrency=settings.concurrency)

    async def _check_health(self) -> bool:
        """Returns whether the gateway answers at all."""
        try:
            status, body = await exchange(self._session, "GET", f"{self._settings.url}/health")
        except Refused as problem:
            self._report.add(Check("health", self._unreached, str(problem), "healthy"))
            return False
        told = json_object(body)
        state = str(told.get("status", f"status {status}"))
        connected = "" if told.get("ml_base_connected", True) else ", no replica connected"
        healthy = status == HTTPStatus.OK and state == "healthy"
        self._report.add(Check("health", healthy, state + connected, "healthy", figures={"reply": told}))
        return True

    async def _check_one_request(self) -> None:
        target = f"< {MAX_LATENCY_MS:.0f} ms"
        try:
            first = await self._target.send(self._texts.one())
            again = await self._target.send(self._texts.one())
        except Refused as problem:
            self._report.add(Check("one request", False, str(problem), target))
            return
        first_ms, again_ms = first.seconds * 1000, again.seconds * 1000
        detail = f"the same text again: {again_ms:.1f} ms, {first_ms / again_ms:.1f} x faster"
        figures = {"first_ms": first_ms, "again_ms": again_ms}
        passed = first_ms < MAX_LATENCY_MS
        self._report.add(Check("one request", passed, f"{first_ms:.0f} ms", target, [detail], figures))

    def _check_success(self, load: Load) -> None:
        mean, p50, p95 = load.mean_ms, load.percentile_ms(50), load.percentile_ms(95)
        answered = len(load.answered)
        rate = answered * self._settings.texts / load.seconds
        latencies = f"mean {mean:.0f} ms, p50 {p50:.0f} ms, p95 {p95:.0f} ms; {rate:.0f} texts/s, none sent before"
        figures = {"success": load.success, "requests": len(load.replies), "answered": answered, "mean_ms": mean}
        self._report.add(
            Check(
                "concurrent load",
                load.success > MIN_SUCCESS,
                f"{load.success:.1%} answered ({answered} of {len(load.replies)} requests)",
                f"> {MIN_SUCCESS:.0%}",
                [latencies, *load.told()],
                figures | {"p50_ms": p50, "p95_ms": p95, "texts_per_s": rate, "failures": dict(load.failures)},
            )
        )

    def _check_repeated(self, first: Load, repeated: Load, counted: Counts | None) -> None:
        """Judges the hits that the replies report, or those that the gateway counted: a storage server reports none."""
        speedup = first.mean_ms / repeated.mean_ms
        faster = f"mean {repeated.mean_ms:.1f} ms after {first.mean_ms:.1f} ms: {speedup:.1f} x faster"
        figures = {"first_mean_ms": first.mean_ms, "repeated_mean_ms": repeated.mean_ms, "speedup": speedup}
        told = (counted or Counts(0, 0)) if self._settings.learn_url else self._told(repeated)
        rate = told.hits / told.texts if told.texts else None
        self._report.add(
            Check(
                "repeated load",
                self._unreached if rate is None else rate > MIN_HIT_RATE,
                "no figure: no text reached the gateway" if rate is None else f"{rate:.1%} from the cache",
                f"> {MIN_HIT_RATE:.0%}",
                [faster, *repeated.told()],
                figures
                | {"hit_rate": rate, "texts": told.texts, "hits": told.hits, "failures": dict(repeated.failures)},
            )
        )
        if not self._settings.learn_url:
            self._report.add(judge_counters(told, counted))

    def _told(self, load: Load) -> Counts:
        return Counts(len(load.answered) * self._settings.texts, sum(reply.cached or 0 for reply in load.answered))

    def _check_same_vectors(self, first: Load, repeated: Load) -> None:
        pairs = zip(first.replies, repeated.replies, strict=True)
        cosines = [
            _lowest_cosine(one.vectors, two.vectors)
            for one, two in pairs
            if one is not None and two is not None and one.vectors is not None and two.vectors is not None
        ]
        if not cosines:
            return
        lowest = min(cosines)
        self._report.add(
            Check(
                "same vectors",
                lowest >= MIN_COSINE,
                f"lowest cosine {lowest:.6f} in {len(cosines)} replies",
                f">= {MIN_COSINE}",
                figures={"lowest_cosine": lowest, "replies": len(cosines)},
            )
        )

    def _check_replicas(self, before: dict[str, Server] | str, after: dict[str, Server] | str) -> None:
        expected = self._settings.replicas
        if isinstance(before, str) or isinstance(after, str):
            reason = before if isinstance(before, str) else str(after)
            self._report.add(Check("replicas", self._unreached, reason, f"all {expected} take part, none down"))
            return
        self._report.add(judge_replicas(before, after, expected=expected))

    async def _servers(self) -> dict[str, Server] | str:
        """Returns HAProxy's table, or the reason why there is none."""
        try:
            status, body = await exchange(self._session, "GET", f"{self._settings.stats_url}/stats;csv")
            if status != HTTPStatus.OK:
                raise refusal(status, body)
            return parse_servers(body.decode(errors="replace"), self._settings.backend)
        except Refused as problem:
            return f"HAProxy's figures: {problem}"

    async def _counts(self) -> Counts | None:
        """Returns the gateway's own counts of texts and hits so far, or None."""
        try:
            _, body = await exchange(self._session, "GET", f"{self._settings.url}/cache/stats")
            total = json_object(body)["total"]
            return Counts(int(total["requests"]), int(total["hits"]))
        except (Refused, KeyError, TypeError, ValueError):
            return None


def _growth(before: Counts | None, after: Counts | None) -> Counts | None:
    if before is None or after is None:
        return None
    return Counts(after.texts - before.texts, after.hits - before.hits)


def judge_counters(told: Counts, counted: Counts | None) -> Check:
    """Passes if the gateway counted at least what its replies reported. A higher count is traffic of other callers."""
    target = "/cache/stats agrees with the replies"
    if counted is None:
        return Check("counters", False, "no usable answer from /cache/stats", target)
    details = [] if counted == told else [f"the replies report {told.hits} hits of {told.texts} texts"]
    if counted.texts > told.texts:
        details.append("others were served meanwhile")
    return Check(
        "counters",
        counted.texts >= told.texts and counted.hits >= told.hits,
        f"{counted.hits} hits of {counted.texts} texts counted",
        target,
        details,
        {"counted_texts": counted.texts, "counted_hits": counted.hits, "texts": told.texts, "hits": told.hits},
    )


def _lowest_cosine(one: NDArray[np.float32], two: NDArray[np.float32]) -> float:
    """Returns the lowest cosine between rows of one index, or -1 for unequal shapes, which equal texts cannot have."""
    if one.shape != two.shape:
        return -1.0
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
    return float(np.min(np.sum(one * two, axis=1) / np.maximum(norms, 1e-12)))
