"""The metrics of the gateway. Each has one sentence and one place where it is raised; all exist from the start.

They are cells of a `Scoreboard`, so that every process of the gateway answers for all of them, and so that counting
costs a tenth of a microsecond; prometheus-client only writes them out.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter as Tally
from dataclasses import dataclass
from importlib.metadata import version
from itertools import accumulate
from types import MappingProxyType
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import generate_latest

from embedding_service.observability.scoreboard import FIELDS, Scoreboard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any

VERSION = version("embedding-service")

OTHER = "other"  # the label of every route that has none of its own
OUTCOMES = ("l1", "l2", "joined", "upstream", "failed")  # of a text: the values of `core.query.Outcome`
STATUSES = (200, 400, 401, 403, 404, 405, 408, 413, 422, 424, 429, 499, 500, 503, 504)
_OTHER_STATUS = "other"
_BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_MICRO = 1_000_000


class Cell:
    """One integer in the row of this process."""

    __slots__ = ("_board", "_field", "_row")

    def __init__(self, board: Scoreboard, field: int) -> None:
        self._board = board
        self._row = board.row
        self._field = field

    def inc(self, amount: int = 1) -> None:
        self._row[self._field] += amount

    def set(self, value: int) -> None:
        self._row[self._field] = value

    @property
    def own(self) -> int:
        """The value of this process."""
        return self._row[self._field]

    @property
    def total(self) -> int:
        """The sum over all processes of this gateway, dead ones included."""
        return self._board.total(self._field)


class Maximum:
    """The largest value so far of a quantity that is never negative, over all processes; it is kept in millionths."""

    __slots__ = ("_board", "_field", "_row")

    def __init__(self, board: Scoreboard, field: int) -> None:
        self._board = board
        self._row = board.row
        self._field = field

    def raise_to(self, value: float) -> None:
        self._row[self._field] = max(self._row[self._field], round(value * _MICRO))

    @property
    def value(self) -> float:
        return self._board.largest(self._field) / _MICRO


class Histogram:
    """A histogram of seconds."""

    __slots__ = ("buckets", "micros")

    def __init__(self, figure: Callable[[], Cell]) -> None:
        self.buckets = [figure() for _ in range(len(_BOUNDS_S) + 1)]
        self.micros = figure()

    def observe(self, duration_s: float) -> None:
        self.buckets[bisect_left(_BOUNDS_S, duration_s)].inc()
        self.micros.inc(int(duration_s * _MICRO))


@dataclass(slots=True)
class _MirroredCounter:
    figure: Cell
    read: Callable[[], int]
    seen: int = 0

    def catch_up(self) -> None:
        now = self.read()
        self.figure.inc(now - self.seen)
        self.seen = now


class Metrics:
    """All metrics of one gateway process, which `board` shares with the other workers.

    `routes` gives the label of each path that embeds (api/routes.py); every other path is counted as `OTHER`.
    """

    def __init__(self, board: Scoreboard | None = None, *, routes: Mapping[str, str] = MappingProxyType({})) -> None:
        self.board = board if board is not None else Scoreboard(fields=FIELDS)
        self.started_at = time.monotonic()
        self._routes = routes
        self._fields = 0
        self._counters: list[tuple[str, str, Sequence[str], dict[tuple[str, ...], Cell]]] = []
        self._histograms: list[tuple[str, str, Sequence[str], dict[tuple[str, ...], Histogram]]] = []
        self._maxima: list[tuple[str, str, Maximum]] = []
        self._gauges: list[tuple[str, str, Cell, Callable[[], float]]] = []
        self._mirrored: list[_MirroredCounter] = []

        self.requests = self._counter("embed_requests", "Embedding requests, whatever became of them.")
        self.outcomes = dict(self._labelled("texts", "Texts by where their vector came from.", "outcome", OUTCOMES))
        self.tokens = self._counter("tokens", "Tokens of all texts answered, cached ones included.")
        self.truncated = self._counter("truncated_texts", "Texts answered that were cut to the model's limit.")
        self.l2_lookups = dict(self._labelled("l2_lookups", "Keys looked up in Redis.", "result", ("hit", "miss")))
        self.l2_errors = dict(
            self._labelled("l2_errors", "Redis calls that failed or timed out.", "operation", ("get", "set", "ping"))
        )
        self.l2_rejected = self._counter("l2_rejected_entries", "Entries read from Redis that failed their check.")
        self.l2_dropped = self._counter("l2_dropped_writes", "Entries not written: Redis away, or its queue full.")
        results = ("ok", "refused", "failed", "timeout")
        self.upstream_calls = dict(
            self._labelled("upstream_calls", "Calls to HAProxy by how they ended.", "result", results)
        )
        self.upstream_retries = self._counter("upstream_retries", "Calls repeated on another replica.")
        self.unusable_replies = self._counter(
            "unusable_replies", "Replies to /embed that no healthy replica would give; the log names it."
        )
        self.upstream_texts = self._counter("upstream_texts", "Texts sent upstream.")
        self.start_overs = self._counter(
            "start_overs", "Requests that looked up a second time: another fingerprint, or time."
        )
        self.drift_checks = dict(
            self._labelled(
                "drift_checks",
                "Cached vectors computed again: equal but for rounding, different, or left out.",
                "result",
                ("same", "different", "skipped"),
            )
        )
        self.drift_worst = self._maximum("drift_worst", "Largest 1 - cosine of a cached vector to its recomputation.")
        self._replies = self._reply_counters()
        self._reply_s = self._route_durations()
        self.upstream_duration = self._durations("upstream_duration", "One call to HAProxy, its repetition included.")

    # --- counting ---

    def count_answer(self, outcomes: Sequence[str], tokens: int, truncated: int) -> None:
        """One request was answered: an outcome for each of its texts."""
        if outcomes.count(outcomes[0]) == len(outcomes):
            self.outcomes[outcomes[0]].inc(len(outcomes))
        else:
            for outcome, texts in Tally(outcomes).items():
                self.outcomes[outcome].inc(texts)
        self.tokens.inc(tokens)
        if truncated:
            self.truncated.inc(truncated)

    def count_failed(self, texts: int) -> None:
        """One request failed, and so did each of its texts, wherever the others' vectors already were."""
        self.outcomes["failed"].inc(texts)

    def observe(self, scope: Mapping[str, Any], status: int, duration_s: float) -> None:
        """Counts a reply; `scope` is the ASGI scope of its request."""
        path = scope["path"]
        if path == "/" and scope["method"] != "POST":
            path = OTHER  # a probe of the base URL, not a request to embed
        self.count_reply(path, status, duration_s)

    def count_reply(self, path: str, status: int, duration_s: float) -> None:
        """One request is over."""
        route = self._routes.get(path, OTHER)
        if route is not OTHER:
            self.requests.inc()
        replies = self._replies[route]
        (replies.get(status) or replies[0]).inc()
        self._reply_s[route].observe(duration_s)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> Cell:
        """A number that its owner keeps anyway: `publish` copies it to the scoreboard."""
        figure = Cell(self.board, FIELDS - 1 - len(self._gauges))  # at the end of the row, where `withdraw` clears
        self._gauges.append((name, text, figure, read))
        return figure

    def mirror(self, name: str, text: str, read: Callable[[], int]) -> Cell:
        """A counter that its owner keeps anyway, from 0: `publish` adds what it has grown by since the last time."""
        figure = self._counter(name, text)
        self._mirrored.append(_MirroredCounter(figure, read))
        return figure

    def publish(self) -> None:
        """Copies the gauges of this process to the scoreboard, where the other workers can see them."""
        for counter in self._mirrored:
            counter.catch_up()
        for _, _, figure, read in self._gauges:
            figure.set(int(read()))

    # --- reading ---

    def totals(self) -> dict[str, int]:
        """Texts by outcome, over all processes."""
        return {outcome: figure.total for outcome, figure in self.outcomes.items()}

    def uptime_s(self) -> float:
        return time.monotonic() - self.started_at

    def exposition(self) -> bytes:
        """The Prometheus text format."""
        self.publish()
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> Iterator[Metric]:
        """What prometheus-client writes out: sums over all processes."""
        for name, text, labels, counters in self._counters:
            family = CounterMetricFamily(f"embedding_{name}", text, labels=labels)
            for values, figure in counters.items():
                family.add_metric(values, figure.total)
            yield family
        for name, text, labels, histograms in self._histograms:
            buckets = HistogramMetricFamily(f"embedding_{name}_seconds", text, labels=labels)
            for values, durations in histograms.items():
                counts = accumulate(figure.total for figure in durations.buckets)
                bounds = [*map(str, _BOUNDS_S), "+Inf"]
                buckets.add_metric(values, list(zip(bounds, counts, strict=True)), durations.micros.total / _MICRO)
            yield buckets
        for name, text, figure, _ in self._gauges:
            yield GaugeMetricFamily(f"embedding_{name}", text, value=figure.total)
        for name, text, maximum in self._maxima:
            yield GaugeMetricFamily(f"embedding_{name}", text, value=maximum.value)
        yield InfoMetricFamily("embedding_build", "What runs.", value={"version": VERSION})

    # --- making ---

    def _figure(self) -> Cell:
        self._fields += 1
        return Cell(self.board, self._fields - 1)

    def _counter(self, name: str, text: str) -> Cell:
        figure = self._figure()
        self._counters.append((name, text, (), {(): figure}))
        return figure

    def _labelled(self, name: str, text: str, label: str, values: Iterable[str]) -> list[tuple[str, Cell]]:
        figures = [(value, self._figure()) for value in values]
        self._counters.append((name, text, (label,), {(value,): figure for value, figure in figures}))
        return figures

    def _maximum(self, name: str, text: str) -> Maximum:
        self._fields += 1
        maximum = Maximum(self.board, self._fields - 1)
        self._maxima.append((name, text, maximum))
        return maximum

    def _durations(self, name: str, text: str) -> Histogram:
        durations = Histogram(self._figure)
        self._histograms.append((name, text, (), {(): durations}))
        return durations

    def _labels(self) -> list[str]:
        return [*dict.fromkeys(self._routes.values()), OTHER]

    def _reply_counters(self) -> dict[str, dict[int, Cell]]:
        """Counters by route and status; 0 stands for a status that is not in the list."""
        replies = {route: {status: self._figure() for status in (*STATUSES, 0)} for route in self._labels()}
        series: dict[tuple[str, ...], Cell] = {
            (route, str(status or _OTHER_STATUS)): figure
            for route, by_status in replies.items()
            for status, figure in by_status.items()
        }
        self._counters.append(("requests", "Replies by route and status.", ("route", "status"), series))
        return replies

    def _route_durations(self) -> dict[str, Histogram]:
        durations = {route: Histogram(self._figure) for route in self._labels()}
        text = "From the first byte of a request to the last of its reply."
        self._histograms.append(
            ("request_duration", text, ("route",), {(route,): one for route, one in durations.items()})
        )
        return durations


def shared_scoreboard(*, fd: int, slots: int, slot: int) -> Scoreboard:
    """The scoreboard of a gateway of several processes, as one of them sees it."""
    return Scoreboard(fields=FIELDS, slots=slots, slot=slot, fd=fd)
