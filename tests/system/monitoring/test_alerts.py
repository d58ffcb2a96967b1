"""The alert rules speak of metrics that exist: a renamed one would silence its alert for ever."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from embedding_common.contract import Lane
from embedding_service.api.routes import metric_labels
from embedding_service.app import build_service
from embedding_service.config import Settings
from embedding_service.observability.metrics import Metrics
from ml_base.metrics import Metrics as ReplicaMetrics

ROOT = Path(__file__).resolve().parents[3]
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((ROOT / "compose" / "monitoring" / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
METRIC = re.compile(r"\b(?:embedding|ml_base)_\w+")
LABEL = re.compile(r'(\w+)="(\w+)"')


def exported() -> str:
    gateway = Metrics(routes=metric_labels())
    build_service(Settings(), gateway)
    replica = ReplicaMetrics()
    replica.watch(waiting=lambda lane: len(Lane(lane)), draining=lambda: False, running_for_s=lambda: 0.0)
    return gateway.exposition().decode() + replica.exposition().decode()


EXPORTED = exported()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_a_rule_names_metrics_and_labels_that_are_exported(rule: dict[str, Any]) -> None:
    names = METRIC.findall(rule["expr"])
    assert names
    for name in names:
        assert re.search(rf"^{name}[ {{]", EXPORTED, re.MULTILINE), name
    for label, value in LABEL.findall(rule["expr"]):
        assert f'{label}="{value}"' in EXPORTED


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_a_rule_says_what_happened_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["annotations"]["summary"].endswith(".")
    assert rule["annotations"]["action"].endswith((".", "?"))
    assert rule["labels"]["severity"] in {"page", "ticket"}


@pytest.mark.parametrize(("enabled", "alerts"), [(True, True), (False, False)])
def test_redis_is_missed_only_where_it_is_wanted(*, enabled: bool, alerts: bool) -> None:
    metrics = Metrics(routes=metric_labels())
    build_service(Settings(REDIS_ENABLED=enabled), metrics)
    expr: str = next(rule["expr"] for rule in RULES if rule["alert"] == "RedisAway")
    figures = dict(re.findall(r"^(embedding_\w+) (\S+)$", metrics.exposition().decode(), re.MULTILINE))
    connected, wanted = (float(figures.get(term, term)) for term in re.sub(r"max\((\w+)\)", r"\1", expr).split(" < "))
    assert (connected < wanted) == alerts


def test_a_callers_own_mistake_pages_no_operator() -> None:
    expr: str = next(rule["expr"] for rule in RULES if rule["alert"] == "RequestsFail")
    counted = re.compile(re.search(r'status=~"([^"]+)"', expr)[1])  # type: ignore[index]
    statuses = set(re.findall(r'route="/embed",status="(\d+)"', EXPORTED))
    assert {status for status in statuses if counted.fullmatch(status)} == {"424", "429", "500", "503", "504"}
