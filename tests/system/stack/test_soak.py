"""A short soak of a replica: the same load as scripts/bench/soak.py, which takes an hour."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
from local_stack.stack import LocalStack

sys.path.append(str(Path(__file__).resolve().parents[3] / "scripts" / "bench"))

from soak import Soak, slope

pytestmark = pytest.mark.stack

SOAK_S = 60.0
MOST_GROWTH_MB = 12.0  # from the second third to the last: a leak of 100 bytes a token would be 20


def test_a_minute_of_random_load_leaves_the_replicas_memory_where_it_was(tmp_path: Path) -> None:
    with LocalStack(state_dir=tmp_path, replicas=1) as stack:
        stack.start()
        stack.wait_ready()
        soak = Soak(stack.ml_url, stack.replicas[0].pid, seed=1)
        asyncio.run(soak.run(SOAK_S))
    early = max(mb for at, mb in soak.samples if SOAK_S / 3 <= at < 2 * SOAK_S / 3)
    late = max(mb for at, mb in soak.samples if at >= 2 * SOAK_S / 3)
    assert soak.texts > 500
    assert soak.abandoned > 0
    assert late - early < MOST_GROWTH_MB, f"{early:.1f} MB grew to {late:.1f} MB"


def test_the_slope_is_that_of_the_line_through_the_points() -> None:
    assert slope([(0, 10), (1, 12), (2, 14)]) == pytest.approx(2)
