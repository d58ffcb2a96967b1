from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from embedding_service.api.routes import metric_labels
from embedding_service.cache.epoch import Epoch
from embedding_service.core.query import Outcome
from embedding_service.observability.metrics import Metrics, shared_scoreboard
from embedding_service.observability.scoreboard import FIELDS, GAUGES, Scoreboard, withdraw

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def fd() -> Iterator[int]:
    fd = Scoreboard.file()
    yield fd
    os.close(fd)


def test_each_process_writes_its_own_row_and_reads_the_sum(fd: int) -> None:
    boards = [Scoreboard(fields=3, slots=2, slot=slot, fd=fd) for slot in range(2)]
    boards[0].row[1] += 5
    boards[1].row[1] += 7
    assert [board.total(1) for board in boards] == [12, 12]
    assert [list(board.row) for board in boards] == [[0, 5, 0], [0, 7, 0]]


def test_a_successor_in_a_slot_counts_on(fd: int) -> None:
    Scoreboard(fields=3, slots=2, slot=0, fd=fd).row[2] += 4
    successor = Scoreboard(fields=3, slots=2, slot=0, fd=fd)
    successor.row[2] += 1
    assert successor.total(2) == 5


def test_the_epoch_belongs_to_every_process_and_never_falls(fd: int) -> None:
    boards = [Scoreboard(fields=1, slots=2, slot=slot, fd=fd) for slot in range(2)]
    one, other = (Epoch(forget=lambda: None, cell=board.epoch_cell) for board in boards)
    one.raise_to(9)
    other.raise_to(7)
    assert one.cell[0] == other.cell[0] == 9


def test_metrics_of_all_processes_are_written_out_as_one(fd: int) -> None:
    one, other = (Metrics(shared_scoreboard(fd=fd, slots=2, slot=slot), routes=metric_labels()) for slot in range(2))
    one.count_answer([Outcome.L1, Outcome.L1], tokens=9, truncated=1)
    other.count_answer([Outcome.L2], tokens=3, truncated=0)
    other.count_reply("/embed", 200, 0.004)
    other.count_reply("/anything", 418, 0.2)
    text = one.exposition().decode()
    for line in (
        'embedding_texts_total{outcome="l1"} 2.0',
        'embedding_texts_total{outcome="l2"} 1.0',
        "embedding_tokens_total 12.0",
        "embedding_truncated_texts_total 1.0",
        'embedding_requests_total{route="/embed",status="200"} 1.0',
        'embedding_requests_total{route="other",status="other"} 1.0',
        'embedding_request_duration_seconds_bucket{le="0.0025",route="/embed"} 0.0',
        'embedding_request_duration_seconds_bucket{le="0.005",route="/embed"} 1.0',
        'embedding_request_duration_seconds_bucket{le="+Inf",route="/embed"} 1.0',
        'embedding_request_duration_seconds_sum{route="/embed"} 0.004',
    ):
        assert line in text


def test_what_a_cache_counted_is_never_less_though_its_process_ends(fd: int) -> None:
    for _ in range(2):  # the second is the successor of the first, in its row
        metrics = Metrics(shared_scoreboard(fd=fd, slots=2, slot=0))
        metrics.mirror("l1_evictions", "Vectors pushed out of L1.", lambda: 5)
        metrics.publish()
        withdraw(fd, 0)
    assert "embedding_l1_evictions_total 10.0" in metrics.exposition().decode()


def test_gauges_of_all_processes_add_up_once_published(fd: int) -> None:
    one, other = (Metrics(shared_scoreboard(fd=fd, slots=2, slot=slot), routes=metric_labels()) for slot in range(2))
    for metrics, value in ((one, 3), (other, 4)):
        metrics.gauge("l1_entries", "Vectors in L1.", lambda value=value: value)
    other.publish()
    assert "embedding_l1_entries 7.0" in one.exposition().decode()


def test_what_a_process_held_is_taken_off_the_board_and_what_it_counted_is_not(fd: int) -> None:
    ended, other = (Metrics(shared_scoreboard(fd=fd, slots=2, slot=slot), routes=metric_labels()) for slot in range(2))
    for metrics in (ended, other):
        held = metrics.gauge("held", "What is held.", lambda: 5)
        metrics.publish()
        metrics.requests.inc()
    withdraw(fd, 0)
    assert (held.total, other.requests.total) == (5, 2)


def test_no_counter_lies_where_gauges_do() -> None:
    assert Metrics()._fields <= FIELDS - GAUGES
