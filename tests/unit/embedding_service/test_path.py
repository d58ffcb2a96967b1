"""Few files are on the path of a text: a reader follows a request through them (docs/adr/0010)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.gateway import settle

if TYPE_CHECKING:
    from types import FrameType

    from tests.support.gateway_client import Client

ROOT = Path(__file__).resolve().parents[3]

# Not visited in this process: http/protocol.py, which the test's transport stands in for.
HIT = {
    "embedding_common/contract.py",
    "embedding_common/encoding.py",  # only since the fake model's vectors do not have unit length
    "embedding_common/http/edge.py",
    "embedding_common/native.py",
    "embedding_service/api/render.py",
    "embedding_service/api/serving.py",
    "embedding_service/cache/entry.py",
    "embedding_service/cache/lru.py",
    "embedding_service/core/embedder.py",
    "embedding_service/observability/metrics.py",
}
# Nor cache/redis/{client,store}.py, which the fake store stands in for.
MISS = HIT | {
    "embedding_service/core/fill.py",
    "embedding_service/core/singleflight.py",
    "embedding_service/upstream/calls.py",
    "embedding_service/upstream/lanes.py",
}


async def visited(client: Client, text: str) -> set[str]:
    """The files of which code runs while one text is answered."""
    files: set[str] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            files.add(frame.f_code.co_filename)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        assert (await client.embed(text)).status_code == 200
    finally:
        sys.setprofile(before)
    await settle()
    ours = (Path(file) for file in files if file.startswith(str(ROOT / "embedding_")))
    return {str(file.relative_to(ROOT)) for file in ours}


async def test_a_hit_and_a_miss_run_code_of_few_files(client: Client) -> None:
    for text in ("first", "first"):  # what is learnt once: the key space, the replica, the vector's length
        await client.embed(text)
    assert await visited(client, "first") == HIT
    assert await visited(client, "second") == MISS
