"""Counters of the gateway. Each has one sentence and one place where it is raised; all exist from the start."""

from __future__ import annotations

import enum
import time
from collections import Counter as Counts
from importlib.metadata import version
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.exposition import generate_latest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# A second series for every first, which nobody here reads.
disable_created_metrics()  # type: ignore[no-untyped-call]  # this function lacks annotations in the library

VERSION = version("embedding-service")

ROUTES = ("/embed", "other")
_LATENCY_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Outcome(enum.StrEnum):
    """Where a text's vector came from. Every text sent ends in exactly one of these."""

    L1 = "l1"
    L2 = "l2"
    JOINED = "joined"
    UPSTREAM = "upstream"
    FAILED = "failed"


CACHED = frozenset({Outcome.L1, Outcome.L2, Outcome.JOINED})


class Metrics:
    """One gateway process's figures: plain counts for `/cache/stats`, Prometheus series for the rest."""

    def __init__(self) -> None:
        self.started_at = time.monotonic()
        self.requests = 0  # embedding requests, whatever became of them
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, label: str = "", values: Iterable[str] = ()) -> Counter:
            made = Counter(f"embedding_{name}", text, [label] if label else [], registry=self.registry)
            for value in values:
                made.labels(value)
            return made

        texts = counter("texts", "Texts by where their vector came from.", "outcome", Outcome)
        self._texts = {outcome: texts.labels(outcome) for outcome in Outcome}
        self.outcomes = dict.fromkeys(Outcome, 0)
        self.tokens = counter("tokens", "Tokens of all texts answered, cached ones included.")
        self.truncated = counter("truncated_texts", "Texts answered that were cut to the model's limit.")
        self.requests_by_status = Counter(
            "embedding_requests", "Replies by route and status.", ["route", "status"], registry=self.registry
        )
        duration = Histogram(
            "embedding_request_duration_seconds",
            "From the first byte of a request to the last of its reply.",
            ["route"],
            buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self._duration = {route: duration.labels(route) for route in ROUTES}
        for route in ROUTES:
            self.requests_by_status.labels(route, 200)

        self.l2_lookups = dict.fromkeys(("hit", "miss"), 0)
        self.l2_errors = counter(
            "l2_errors", "Redis calls that failed or timed out.", "operation", ("get", "set", "ping")
        )
        self.l2_rejected = counter("l2_rejected_entries", "Entries read from Redis that failed their check.")
        self.l2_dropped = counter("l2_dropped_writes", "Entries not written: Redis away, or its queue full.")
        self.upstream_calls = counter(
            "upstream_calls", "Calls to HAProxy by how they ended.", "result", ("ok", "refused", "failed", "timeout")
        )
        self.upstream_retries = counter("upstream_retries", "Calls repeated on another replica.")
        self.upstream_duration = Histogram(
            "embedding_upstream_duration_seconds",
            "One call to HAProxy, its repetition included.",
            buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.upstream_texts = counter("upstream_texts", "Texts sent upstream.")
        self.start_overs = counter(
            "start_overs", "Requests that looked up a second time: another fingerprint, or time."
        )
        Gauge("embedding_build_info", "Always 1.", ["version"], registry=self.registry).labels(VERSION).set(1)

    def count_answer(self, outcomes: Iterable[Outcome], tokens: int, truncated: int) -> None:
        """One request was answered: an outcome for each of its texts."""
        for outcome, texts in Counts(outcomes).items():
            self.outcomes[outcome] += texts
            self._texts[outcome].inc(texts)
        self.tokens.inc(tokens)
        if truncated:
            self.truncated.inc(truncated)

    def count_failed(self, texts: int) -> None:
        """One request failed, and so did each of its texts, wherever the others' vectors already were."""
        self.outcomes[Outcome.FAILED] += texts
        self._texts[Outcome.FAILED].inc(texts)

    def l2_error_count(self) -> int:
        return sum(
            int(sample.value)
            for family in self.l2_errors.collect()
            for sample in family.samples
            if sample.name.endswith("_total")
        )

    def observe_reply(self, route: str, status: int, duration_s: float) -> None:
        route = route if route in self._duration else "other"
        self.requests_by_status.labels(route, status).inc()
        self._duration[route].observe(duration_s)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A figure that its owner already keeps: read when somebody looks."""
        Gauge(f"embedding_{name}", text, registry=self.registry).set_function(read)

    def exposition(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)

    def uptime_s(self) -> float:
        return time.monotonic() - self.started_at
