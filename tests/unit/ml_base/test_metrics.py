from __future__ import annotations

import re

from embedding_common.contract import Lane, ModelCard
from ml_base.batching.batches import BatchReport
from ml_base.metrics import Metrics

CARD = ModelCard(id="m", fingerprint="f", dimension=1, max_tokens=1)


def watched(waiting: dict[Lane, int] | None = None) -> Metrics:
    metrics = Metrics()
    metrics.watch(
        waiting=lambda lane: (waiting or {}).get(lane, 0),
        draining=lambda: True,
        running_for_s=lambda: 1.5,
    )
    return metrics


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def series(metrics: Metrics) -> set[str]:
    return {line.rpartition(" ")[0] for line in metrics.exposition().decode().splitlines() if line[0] != "#"}


def test_every_series_exists_from_the_start() -> None:
    metrics = watched()
    before = series(metrics)
    for path in ("/embed", "/health", "/nowhere"):
        for status in (200, 404, 422, 499, 503, 504, 777):
            metrics.request(path, status)
    for lane in Lane:
        metrics.answered(lane, 0.1)
        metrics.refused(lane, 1)
        metrics.dropped(lane, 1)
        metrics.batch_done(BatchReport(lane, 3, 1, 30, 40, 0.1, 0.2))
    assert series(metrics) == before


def test_every_name_has_our_prefix_and_its_unit() -> None:
    ours = [name for name in series(watched()) if not name.startswith("process_")]
    assert all(name.startswith("ml_base_") for name in ours)
    assert all(re.search(r"_(total|seconds|texts|bucket|sum|count|info|draining|created)(\{|$)", name) for name in ours)


def test_callers_cannot_make_series() -> None:
    metrics = watched()
    metrics.request("/../../etc", 418)
    assert value(metrics, "ml_base_requests_total", route="other", status="other") == 1


def test_a_batch_is_counted_by_texts_tokens_and_time() -> None:
    metrics = watched()
    metrics.batch_done(
        BatchReport(Lane.BULK, texts=3, failed=1, tokens=30, padded_tokens=40, took_s=2, oldest_wait_s=4)
    )
    assert value(metrics, "ml_base_texts_total", lane="bulk", outcome="computed") == 2
    assert value(metrics, "ml_base_texts_total", lane="bulk", outcome="failed") == 1
    assert value(metrics, "ml_base_tokens_total", kind="text") == 30
    assert value(metrics, "ml_base_tokens_total", kind="padding") == 10
    assert value(metrics, "ml_base_slice_seconds_sum", lane="bulk") == 2
    assert value(metrics, "ml_base_wait_seconds_sum", lane="bulk") == 4


def test_gauges_are_read_when_the_metrics_are() -> None:
    waiting = {Lane.BULK: 4}
    metrics = watched(waiting)
    assert value(metrics, "ml_base_queue_texts", lane="bulk") == 4
    assert value(metrics, "ml_base_draining") == 1
    assert value(metrics, "ml_base_running_seconds") == 1.5
    waiting[Lane.BULK] = 9
    assert value(metrics, "ml_base_queue_texts", lane="bulk") == 9


def test_a_model_is_shown_as_long_as_it_is_in_memory() -> None:
    metrics = watched()
    labels = {"model": "m", "fingerprint": "f", "backend": "", "dtype": ""}
    assert value(metrics, "ml_base_model_info", **labels) is None
    metrics.model_loaded(CARD)
    assert value(metrics, "ml_base_model_info", **labels) == 1
    metrics.model_unloaded(CARD)
    assert value(metrics, "ml_base_model_info", **labels) is None


def test_texts_of_which_only_a_part_was_read_are_counted() -> None:
    metrics = watched()
    metrics.truncated(3)
    assert value(metrics, "ml_base_truncated_texts_total") == 3
