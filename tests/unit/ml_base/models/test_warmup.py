from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ml_base.batching.batches import Grid
from ml_base.models import warmup
from ml_base.models.warmup import Bounds, find_batch_tokens, warm
from tests.support.model_server import Clock, FakeBackend

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from ml_base.backends import Tokenized


class Costly(FakeBackend):
    """Its clock goes on only while it computes: by `cost` seconds of the tokens in a batch.

    Costs are a hundred times those of a real model, so that what a batch costs besides does not matter.
    """

    max_tokens = 256

    def __init__(self, cost: Callable[[int], float], *, grid: Grid | None = None) -> None:
        super().__init__()
        self.cost = cost
        self.grid = grid or Grid()
        self.clock = Clock()
        self.shapes: list[tuple[int, int]] = []

    def embed(self, batch: Sequence[Tokenized]) -> NDArray[np.float32]:
        assert len({text.length for text in batch}) == 1
        self.shapes.append((len(batch), batch[0].length))
        self.clock.now += self.cost(len(batch) * batch[0].length)
        return super().embed(batch)


def found(cost: Callable[[int], float], *, max_s: float = 4.0, sharing: float = 1.0) -> int:
    backend = Costly(cost)
    return find_batch_tokens(backend, Bounds(max_texts=64, max_s=max_s, sharing=sharing), clock=backend.clock)


def with_overhead(tokens: int) -> float:
    """More tokens are always a better use of time."""
    return 0.4 + tokens * 1e-3


def test_no_more_tokens_are_taken_than_throughput_needs() -> None:
    assert found(lambda tokens: max(tokens, 256) * 1e-3) == 256


def test_where_every_size_is_as_fast_the_fewest_tokens_are_taken() -> None:
    assert found(lambda tokens: tokens * 1e-3) == warmup.FEWEST_TOKENS


@pytest.mark.parametrize("max_s", [0.6, 1.0, 2.0])
def test_a_batch_lasts_no_longer_than_it_may(max_s: float) -> None:
    tokens = found(with_overhead, max_s=max_s)
    assert with_overhead(tokens) <= max_s < with_overhead(tokens * 2)


def test_replicas_that_share_cores_take_smaller_batches() -> None:
    shared = found(with_overhead, max_s=2.0, sharing=1.5)
    assert with_overhead(shared) * 1.5 <= 2.0
    assert shared < found(with_overhead, max_s=2.0)


def test_a_model_too_slow_for_any_size_gets_the_fewest_tokens() -> None:
    assert found(lambda tokens: 100.0) == warmup.FEWEST_TOKENS


def test_a_slower_moment_of_the_machine_decides_nothing() -> None:
    calls = iter(range(10_000))
    assert found(lambda tokens: max(tokens, 256) * 1e-3 + 2.0 * (next(calls) % 3 == 0)) == 256


def test_every_shape_is_computed_once_before_anybody_waits() -> None:
    backend = Costly(lambda tokens: 1e-3, grid=Grid.up_to(48))
    warm(backend, Bounds(max_texts=12), tokens=128, clock=backend.clock)
    assert sorted(backend.shapes) == sorted(backend.grid.shapes(128, 12))


def test_a_warm_up_that_takes_too_long_ends_and_says_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    backend = Costly(lambda tokens: 1.0, grid=Grid.up_to(48))
    warm(backend, Bounds(max_texts=12, warm_up_s=4.5), tokens=128, clock=backend.clock)
    every = len(backend.grid.shapes(128, 12))
    assert len(backend.shapes) == 5
    assert f"{every - 5} of {every} shapes are not warmed" in caplog.text


def test_a_model_for_which_all_shapes_are_alike_is_computed_all_the_same() -> None:
    backend = Costly(lambda tokens: 1e-3)
    warm(backend, Bounds(max_texts=12), tokens=128, clock=backend.clock)
    assert backend.shapes
