"""What a replica counts, in a registry of its own. Labels are bounded, and every series exists from the start."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from embedding_common.contract import Lane, ModelCard

if TYPE_CHECKING:
    from collections.abc import Callable

    from ml_base.batching.batches import BatchReport

EMBED = "/embed"
OPERATOR_ROUTES = ("/health", "/livez", "/models", "/models/load", "/models/unload", "/info", "/metrics", "/tokenize")
OPERATOR_STATUSES = ("200", "503")
STATUSES = ("200", "400", "404", "405", "413", "422", "429", "499", "500", "503", "504")
OTHER = "other"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The counters of a replica. Each fact is counted once, where it happens; the help texts say what it is."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = self._counter(
            "requests", "Replies by route and status; 499: hung up first.", "route", "status"
        )
        self._request_seconds = self._histogram(
            "request_seconds", "Time of embed requests answered with 200.", _SECONDS
        )
        self._texts = self._counter(
            "texts",
            "Texts by how they ended: computed, failed, dropped (caller gone, late or shut down), refused (no room).",
            "lane",
            "outcome",
        )
        self._batches = self._counter("slices", "Batches computed.", "lane")
        self._batch_texts = self._histogram("slice_texts", "Texts in a batch.", _TEXTS)
        self._batch_seconds = self._histogram("slice_seconds", "Time the model took for a batch.", _SECONDS)
        self._wait_seconds = self._histogram("wait_seconds", "Longest wait of a text in a batch.", _SECONDS)
        self._tokens = self._counter("tokens", "Tokens computed; padding is computed like text.", "kind")
        self._truncated = self._counter("truncated_texts", "Texts answered of which the model read only a part.")
        names = ["model", "fingerprint", "backend", "dtype"]
        self._models = Gauge("ml_base_model_info", "1 for each model in memory.", names, registry=self.registry)
        self._create_all()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"ml_base_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"ml_base_{name}", text, ["lane"], buckets=buckets, registry=self.registry)

    def _create_all(self) -> None:
        for status in (*STATUSES, OTHER):
            self._requests.labels(EMBED, status)
        for route in (*OPERATOR_ROUTES, OTHER):
            for status in (*OPERATOR_STATUSES, OTHER):
                self._requests.labels(route, status)
        for kind in ("text", "padding"):
            self._tokens.labels(kind)
        for lane in Lane:
            self._batches.labels(lane)
            for outcome in ("computed", "failed", "dropped", "refused"):
                self._texts.labels(lane, outcome)
            for histogram in (self._request_seconds, self._batch_texts, self._batch_seconds, self._wait_seconds):
                histogram.labels(lane)

    def watch(
        self,
        *,
        waiting: Callable[[Lane], int],
        draining: Callable[[], bool],
        running_for_s: Callable[[], float],
    ) -> None:
        """Adds gauges whose values are read when the metrics are written out."""
        queue = Gauge("ml_base_queue_texts", "Texts admitted and not yet settled.", ["lane"], registry=self.registry)
        for lane in Lane:
            queue.labels(lane).set_function(functools.partial(waiting, lane))
        drain = Gauge("ml_base_draining", "1 once the replica was told to stop.", registry=self.registry)
        drain.set_function(draining)
        running = Gauge("ml_base_running_seconds", "Age of the batch that runs, 0 when idle.", registry=self.registry)
        running.set_function(running_for_s)

    def model_loaded(self, card: ModelCard) -> None:
        self._models.labels(*_labels(card)).set(1)

    def model_unloaded(self, card: ModelCard) -> None:
        self._models.remove(*_labels(card))

    def request(self, route: str, status: int) -> None:
        """Counts a reply. Unknown paths and unusual statuses share a label, so that no caller can make new series."""
        known = STATUSES if route == EMBED else OPERATOR_STATUSES
        route = route if route == EMBED or route in OPERATOR_ROUTES else OTHER
        self._requests.labels(route, str(status) if str(status) in known else OTHER).inc()

    def answered(self, lane: Lane, took_s: float) -> None:
        self._request_seconds.labels(lane).observe(took_s)

    def batch_done(self, report: BatchReport) -> None:
        self._batches.labels(report.lane).inc()
        self._batch_texts.labels(report.lane).observe(report.texts)
        self._batch_seconds.labels(report.lane).observe(report.took_s)
        self._wait_seconds.labels(report.lane).observe(report.oldest_wait_s)
        self._texts.labels(report.lane, "computed").inc(report.texts - report.failed)
        self._texts.labels(report.lane, "failed").inc(report.failed)
        self._tokens.labels("text").inc(report.tokens)
        self._tokens.labels("padding").inc(report.padded_tokens - report.tokens)

    def refused(self, lane: Lane, texts: int) -> None:
        self._texts.labels(lane, "refused").inc(texts)

    def dropped(self, lane: Lane, texts: int) -> None:
        self._texts.labels(lane, "dropped").inc(texts)

    def truncated(self, texts: int) -> None:
        self._truncated.inc(texts)

    def exposition(self) -> bytes:
        return generate_latest(self.registry)


def _labels(card: ModelCard) -> tuple[str, str, str, str]:
    return card.id, card.fingerprint, card.backend, card.dtype
