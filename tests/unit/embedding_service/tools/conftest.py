from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.embedding_server import FakeService

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def service() -> Iterator[FakeService]:
    fake = FakeService()
    with fake.server.serving():
        yield fake


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("".join(f"text number {i}\n" for i in range(100)))
    return path
