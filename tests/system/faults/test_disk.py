"""No room for the converted model: the replica computes with what needs none."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from local_stack.stack import LocalStack

from tests.system.faults.load import Load
from tests.system.stack.client import Client
from tests.system.stack.running import running

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = [pytest.mark.faults, pytest.mark.timeout(180)]

# A limit on the size of files fails a write half-way, as a full disk does, and needs no disk.
FULL = """
import resource, runpy
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
runpy.run_module("ml_base", run_name="__main__")
"""


def test_a_full_disk(tmp_path: Path, figures: Callable[..., None]) -> None:
    cache = tmp_path / "cache"
    stack = LocalStack(
        state_dir=tmp_path / "stack",
        replicas=1,
        env={"ML_BASE_CACHE_DIR": str(cache)},
        replica_command=[sys.executable, "-c", FULL],
    )
    with running(stack):
        client = Client(stack)
        with Load(stack.url, callers=2) as load:
            vectors = client.vectors(["a text"])
        client.close()
        figures("disk full for the model cache", requests=len(load), failed=load.failed, ready_after=ready_after(stack))
    assert vectors.shape == (1, 384)
    assert load.failed == 0, load.statuses
    assert not [path for path in cache.rglob("*") if path.suffix == ".bin" and ".new" not in str(path)]


def ready_after(stack: LocalStack) -> str:
    return f"{stack.replicas[0].ready_after_s:.1f} s"
