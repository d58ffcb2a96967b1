"""Refusals and outages: what is tried again, what fails, and what stops the run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from embedding_service.tools.warm import service as warm_service
from tests.support.embedding_server import refusal, told, warm

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.embedding_server import Answer, FakeService


def test_a_refused_text_fails_alone_and_the_rest_of_its_batch_is_sent_again(
    service: FakeService, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {"text number 3", "text number 60", "text number 61"}

    def refuse(request: dict[str, Any]) -> Answer | None:
        index = next((i for i, text in enumerate(request["texts"]) if text in bad), None)
        return None if index is None else refusal(422, f"texts[{index}]: too long", f"texts[{index}]")

    service.misbehave = refuse
    assert warm(service, corpus, "--json") == 1
    out, err = capsys.readouterr()
    assert (json.loads(out)["computed"], json.loads(out)["failed"]) == (97, 3)
    assert [line.partition(":")[0] for line in err.splitlines()] == ["line 4", "line 61", "line 62"]


@pytest.mark.parametrize("status", [413, 500])
def test_a_list_that_cannot_be_taken_is_halved_until_the_culprit_is_alone(
    service: FakeService, corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(warm_service, "FIRST_BACKOFF_S", 0.0)
    service.misbehave = lambda request: refusal(status, "no") if "text number 40" in request["texts"] else None
    assert warm(service, corpus, "--json") == 1
    out, err = capsys.readouterr()
    assert (json.loads(out)["computed"], json.loads(out)["failed"]) == (99, 1)
    assert err == f"line 41: status {status}: no\n"


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_service_is_tried_again_and_no_text_fails(
    service: FakeService, corpus: Path, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    refusals = iter(range(6))
    service.misbehave = lambda _: None if next(refusals, None) is None else refusal(status, "busy", retry_after="0")
    assert warm(service, corpus, "--json") == 0
    assert told(capsys)["computed"] == 100
    assert len(service.requests) == 4 + 6


def test_retry_after_is_waited_for_even_where_the_backoff_is_shorter(
    service: FakeService, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service.misbehave = lambda _: refusal(429, "full", retry_after="7")
    assert warm(service, corpus, "--patience", "5") == 1  # seven seconds do not fit: it stops at once, without waiting
    assert "no answer within the patience of 5 s: status 429: full" in capsys.readouterr().err
    assert len(service.requests) <= 4


def test_an_outage_stops_the_run_and_the_next_one_resumes(
    service: FakeService, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service.misbehave = lambda request: refusal(503, "gone") if "text number 50" in request["texts"] else None
    options = ["--batch", "10", "--concurrency", "1", "--json"]
    assert warm(service, corpus, *options, "--patience", "0.001") == 1
    stopped = told(capsys)
    assert (stopped["complete"], stopped["line"], stopped["resumable"]) == (False, 50, True)
    service.misbehave = lambda _: None
    service.requests.clear()
    assert warm(service, corpus, *options) == 0
    resumed = told(capsys)
    assert (resumed["texts"], resumed["earlier"]["texts"], resumed["complete"]) == (50, 50, True)
    assert service.texts_sent[0] == "text number 50"


def test_a_broken_reply_fails_its_texts_and_no_others(
    service: FakeService, corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_service, "FIRST_BACKOFF_S", 0.0)
    short = {"embeddings": [], "model": "fake", "cached_count": 0}
    service.misbehave = lambda request: (200, short, {}) if "text number 0" in request["texts"] else None
    assert warm(service, corpus, "--json") == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["failed"] == 1
    assert err == "line 1: a broken reply: 1 texts, vectors of shape [0]\n"
