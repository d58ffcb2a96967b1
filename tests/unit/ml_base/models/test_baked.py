"""What an image brings: models of the hub and converted models, looked into first and never written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ml_base.backends import LoadOptions, auto
from ml_base.models.loading import Source, resolve

if TYPE_CHECKING:
    from pathlib import Path


def test_a_model_that_came_with_the_image_is_not_asked_of_the_hub(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--maker--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abcd")
    source = resolve("maker/model", baked_dir=tmp_path)
    assert source == Source("maker/model", str(repository / "snapshots" / "0123abcd"), local=True, found_as="image")
    assert resolve("maker/other", baked_dir=tmp_path).local is False


def test_a_converted_model_that_came_with_the_image_is_used_and_nothing_is_written(tmp_path: Path) -> None:
    location = resolve("all-MiniLM-L6-v2").location
    baked, volume = tmp_path / "baked", tmp_path / "volume"
    auto.load_openvino(location, LoadOptions(local=True, threads=1, cache_dir=baked, dtype="float32"))
    auto.load_openvino(location, LoadOptions(local=True, threads=1, cache_dir=volume, dtype="float32", baked_dir=baked))
    assert not volume.exists()
