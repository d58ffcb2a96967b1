from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from embedding_common import errors
from embedding_common.contract import Lane
from ml_base.batching.batches import Grid
from tests.support.model_server import MAX_TOKENS, FakeBackend, Notes, loaded, server, until, vector_of, workers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ml_base.models.models import ServedModel


@asynccontextmanager
async def serving(backend: FakeBackend, **options: Any) -> AsyncIterator[ServedModel]:
    async with workers() as threads, server(**options)(loaded(backend), **threads) as model:
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
    assert backend.model.batches == []


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
        await until(lambda: len(backend.model.batches) == 1)
        second = asyncio.create_task(model.embed(["b"] * 99, lane=Lane.BULK))
        await until(lambda: model.batcher.reserved(Lane.BULK) == 100)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        assert model.batcher.reserved(Lane.BULK) == 1
        backend.model.finish()
        await first


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


async def test_texts_that_were_cut_are_counted_once_they_are_answered() -> None:
    notes = Notes()
    async with serving(FakeBackend(), observer=notes) as model:
        await model.embed(["a", "b" * 9, "c" * 10], lane=Lane.BULK)
        with pytest.raises(errors.InvalidRequest):
            await model.embed(["d" * 9], lane=Lane.BULK, truncate=False)
    assert notes.cut == 2


async def test_on_a_grid_row_i_still_belongs_to_text_i() -> None:
    texts = [chr(97 + i % 26) * (i % 12) for i in range(100)]
    backend = FakeBackend()
    backend.grid = Grid((4, 8))
    async with serving(backend) as model:
        reply = await model.embed(texts, lane=Lane.BULK)
    assert np.array_equal(reply.vectors, [vector_of(text[:MAX_TOKENS]) for text in texts])


async def test_tokens_are_those_of_the_whole_text_with_its_prompt() -> None:
    async with serving(FakeBackend()) as model:
        [text] = await model.tokenize(["harbours"], prompt_name="query", add_special_tokens=True)
    assert text.tokens == ["<s>", *"ask harbours"]
    assert text.offsets[:2] == [None, (0, 1)]
    assert text.special == [True] + [False] * 12


async def test_tokenizing_an_unknown_prompt_is_refused() -> None:
    async with serving(FakeBackend()) as model:
        with pytest.raises(errors.InvalidRequest, match="prompt_name"):
            await model.tokenize(["a"], prompt_name="nope", add_special_tokens=True)
