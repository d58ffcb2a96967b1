"""Held to `SentenceTransformer.encode` on the real default model: every vector, count and cut."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from ml_base.backends import LoadOptions, UnsupportedModelError, selftest
from ml_base.backends.torch import TorchBackend, load
from ml_base.models.loading import resolve

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ml_base.backends import Direction

TEXTS = [
    "hello",
    "",
    " ",
    "  two  spaces\tand\ttabs\n\nand lines  ",
    "Ünïcode ☃ 日本語 \U0001f600 e\u0301 \u200b",
    "UPPER lower MiXeD",
    "[CLS] special [SEP] tokens [PAD] in [MASK] the [UNK] text",
    "\x00\x07 control \x1b characters",
    "a paragraph of text, as people write it. " * 6,
    "word " * 253,
    "word " * 254,
    "word " * 255,
    "word " * 600,
    "unbelievablyunsegmentable" * 40,
]
PROMPT = "search query: "
MAX_TOKENS = 256
OPTIONS = LoadOptions(local=True, threads=1, cache_dir=Path("nowhere"))


def fresh() -> SentenceTransformer:
    return SentenceTransformer(resolve("all-MiniLM-L6-v2").location, device="cpu", local_files_only=True)


@pytest.fixture(scope="module")
def reference() -> SentenceTransformer:
    return fresh()


@pytest.fixture(scope="module")
def backend() -> TorchBackend:
    return load(resolve("all-MiniLM-L6-v2").location, OPTIONS)


def embed(
    backend: TorchBackend, texts: Sequence[str], *, prompt: str = "", direction: Direction = "right"
) -> NDArray[np.float32]:
    return backend.embed(backend.tokenize(texts, prompt=prompt, direction=direction))


def assert_equal(left: NDArray[np.float32], right: NDArray[np.float32]) -> None:
    assert left.dtype == np.float32
    assert left.shape == right.shape
    cosines = (left * right).sum(axis=1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)
    assert cosines.min() > 0.99999
    assert np.allclose(left, right, atol=1e-5)


def test_pooling_is_named_as_the_model_has_it(backend: TorchBackend) -> None:
    several: Any = fresh()
    several[1].pooling_mode = ("cls", "max")
    assert (backend.pooling, TorchBackend(several).pooling) == ("mean", "cls+max")


def test_a_batch_of_all_sorts_of_texts_equals_encode(backend: TorchBackend, reference: SentenceTransformer) -> None:
    assert_equal(embed(backend, TEXTS), reference.encode(TEXTS))


def test_alone_or_in_company_a_text_has_the_same_vector(backend: TorchBackend, reference: SentenceTransformer) -> None:
    alone = np.concatenate([embed(backend, [text]) for text in TEXTS])
    assert_equal(alone, embed(backend, TEXTS))
    assert_equal(alone, np.stack([reference.encode(text) for text in TEXTS]))


def test_texts_are_cut_on_the_left_as_the_tokenizer_does_it(backend: TorchBackend) -> None:
    left = fresh()
    left.tokenizer.truncation_side = "left"
    texts = ["start " * 300 + "end " * 300, "one short text"]
    assert_equal(embed(backend, texts, direction="left"), left.encode(texts))
    assert np.abs(embed(backend, texts, direction="left")[0] - embed(backend, texts)[0]).max() > 0.01


def test_the_side_of_one_call_does_not_leak_into_the_next(
    backend: TorchBackend, reference: SentenceTransformer
) -> None:
    long = "start " * 300 + "end " * 300
    embed(backend, [long], direction="left")
    assert_equal(embed(backend, [long]), reference.encode([long]))
    assert backend.tokenize([long], prompt="", direction="right")[0].tokens == 602


def test_a_prompt_equals_encode_with_that_prompt(backend: TorchBackend, reference: SentenceTransformer) -> None:
    assert_equal(embed(backend, TEXTS, prompt=PROMPT), reference.encode(TEXTS, prompt=PROMPT))


@pytest.mark.parametrize("direction", ["right", "left"])
def test_a_model_that_leaves_its_prompt_out_of_pooling_does_so_here(direction: Direction) -> None:
    reference, model = fresh(), fresh()
    for each in (reference, model):
        each.set_pooling_include_prompt(include_prompt=False)
    backend = TorchBackend(model)
    texts = TEXTS if direction == "right" else [text for text in TEXTS if len(text) < 1000]
    pooled = embed(backend, texts, prompt=PROMPT, direction=direction)
    assert_equal(pooled, reference.encode(texts, prompt=PROMPT))
    assert np.abs(pooled[0] - embed(backend, ["hello"], prompt="")[0]).max() > 0.01


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_a_prompt_that_leaves_no_room_for_the_text_leaves_out_what_encode_leaves_out(pooling: str) -> None:
    reference, model = fresh(), fresh()
    for each in (reference, model):
        each.set_pooling_include_prompt(include_prompt=False)
        each[1].pooling_mode = pooling
    prompt = PROMPT * 100
    assert_equal(embed(TorchBackend(model), ["hello"], prompt=prompt), reference.encode(["hello"], prompt=prompt))


def test_texts_with_and_without_a_prompt_may_share_a_batch() -> None:
    model = fresh()
    model.set_pooling_include_prompt(include_prompt=False)
    backend = TorchBackend(model)
    plain = backend.tokenize(["a", "b", "c"], prompt="", direction="right")
    prompted = backend.tokenize(["d", "e"], prompt=PROMPT, direction="right")
    mixed = backend.embed([plain[0], prompted[0], plain[1], prompted[1], plain[2]])
    apart = np.concatenate([backend.embed([text]) for text in (plain[0], prompted[0], plain[1], prompted[1], plain[2])])
    assert_equal(mixed, apart)


def test_a_prompt_that_is_cut_off_is_no_longer_left_out() -> None:
    model = fresh()
    model.set_pooling_include_prompt(include_prompt=False)
    backend = TorchBackend(model)
    long, short = backend.tokenize(["word " * 400, "word"], prompt=PROMPT, direction="left")
    assert (long.prompt_tokens, short.prompt_tokens) == (0, 4)


def test_tokens_are_counted_before_the_cut_and_exactly(backend: TorchBackend, reference: SentenceTransformer) -> None:
    exact = [len(ids) for ids in reference.tokenizer(TEXTS, truncation=False, verbose=False)["input_ids"]]
    for direction in ("right", "left"):
        pieces = backend.tokenize(TEXTS, prompt="", direction=direction)
        assert [piece.tokens for piece in pieces] == exact
        assert [piece.truncated for piece in pieces] == [count > MAX_TOKENS for count in exact]
        assert [piece.length for piece in pieces] == [min(count, MAX_TOKENS) for count in exact]


def test_the_card_of_the_default_model(backend: TorchBackend) -> None:
    assert (backend.max_tokens, backend.name, backend.dtype) == (MAX_TOKENS, "torch", "float32")
    assert backend.prompts == {"query": "", "document": ""}
    assert backend.default_prompt_name is None


def test_the_same_model_has_the_same_identity_wherever_it_lies(backend: TorchBackend, tmp_path: Path) -> None:
    fresh().save(str(tmp_path / "copy"), create_model_card=False)
    assert load(str(tmp_path / "copy"), OPTIONS).identity() == backend.identity()


def _one_weight(model: Any) -> None:
    next(iter(model.parameters())).data[0, 0] += 1


def _pooling(model: Any) -> None:
    model.set_pooling_include_prompt(include_prompt=False)


def _length(model: Any) -> None:
    model.max_seq_length = 128


def _normalisation(model: Any) -> None:
    del model[2]


@pytest.mark.parametrize("change", [_one_weight, _pooling, _length, _normalisation])
def test_whatever_changes_a_vector_changes_the_identity(change: Any, backend: TorchBackend) -> None:
    model = fresh()
    change(model)
    assert TorchBackend(model).identity() != backend.identity()


class _Slow:
    is_fast = False


def test_a_model_without_a_fast_tokenizer_is_refused_with_its_reason() -> None:
    model: Any = fresh()
    model[0].processor = _Slow()
    with pytest.raises(UnsupportedModelError, match="first module is Transformer with tokenizer"):
        TorchBackend(model)


def test_a_model_that_does_not_begin_with_a_transformer_is_refused_with_its_reason() -> None:
    model = SentenceTransformer(modules=[fresh()[1]], device="cpu")
    with pytest.raises(UnsupportedModelError, match="first module is Pooling"):
        TorchBackend(model)


def test_another_dtype_is_tested_beside_float32_and_may_not_be_far_from_it(reference: SentenceTransformer) -> None:
    """The path that CUDA takes too, but for where the tensors lie."""
    rough = load(resolve("all-MiniLM-L6-v2").location, replace(OPTIONS, dtype="bfloat16"))
    assert (rough.dtype, rough.name) == ("bfloat16", "torch")
    assert rough.self_test is not None
    assert selftest.FLOOR["bfloat16"].lowest <= rough.self_test < 1
    assert selftest.likeness(embed(rough, TEXTS), reference.encode(TEXTS)).lowest > 0.999


def test_a_dtype_that_is_too_far_from_float32_is_refused_with_the_figure(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(selftest.FLOOR, "bfloat16", selftest.Likeness(1.1, 1.1))
    with pytest.raises(UnsupportedModelError, match=r"self-test of torch in bfloat16 found cosines of 0\.9\d+"):
        load(str(tiny), replace(OPTIONS, dtype="bfloat16"))


def test_a_dtype_that_torch_does_not_compute_in_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(UnsupportedModelError, match="computes in float32, bfloat16, float16, not in int8"):
        load("nowhere", replace(OPTIONS, dtype="int8"))


def test_a_cuda_device_that_is_not_there_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedModelError, match="ML_BASE_DEVICE is cuda, but torch finds no CUDA device here"):
        load("nowhere", replace(OPTIONS, device="cuda"))


def test_offsets_count_characters_whatever_their_bytes_and_special_tokens_have_none(backend: TorchBackend) -> None:
    text = "\U0001f600\U0001f600 harbour e\u0301t\u00e9 \u65e5\u672c"
    [found] = backend.describe([text], prompt="", add_special_tokens=True)
    assert (found.offsets[0], found.offsets[-1], found.special[0], found.special[1]) == (None, None, True, False)
    slices = {text[span[0] : span[1]] for span in found.offsets if span is not None}
    assert {"harbour", "\u65e5", "\u672c"} <= slices
    assert len(found.ids) == len(found.tokens) == len(found.offsets) == len(found.special)


def test_tokens_are_described_uncut_with_the_prompt_and_without_special_tokens_if_asked(backend: TorchBackend) -> None:
    [long] = backend.describe(["word " * 600], prompt="", add_special_tokens=True)
    [bare] = backend.describe(["harbour"], prompt="ask ", add_special_tokens=False)
    assert len(long.ids) == 602
    assert (bare.tokens, bare.offsets, bare.special) == (["ask", "harbour"], [(0, 3), (4, 11)], [False, False])
