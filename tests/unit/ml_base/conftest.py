from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.tiny_model import save_tiny

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model small enough to convert in a moment."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")
