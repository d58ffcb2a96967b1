"""OpenVINO beside torch on the real default model, and what happens to a backend that computes something else."""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from ml_base import selftest
from ml_base.backends import LoadOptions, UnsupportedModelError, auto
from ml_base.backends.openvino import OpenVinoBackend, converted
from ml_base.backends.torch import TorchBackend
from ml_base.models import resolve

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

LOCATION = resolve("all-MiniLM-L6-v2").location
TEXTS = ["", "hello", "two words", "Ünïcode ☃ 日本語", "a paragraph of text, as people write it. " * 6, "word " * 600]


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted once for all tests of this file."""
    return tmp_path_factory.mktemp("converted")


def model() -> SentenceTransformer:
    return SentenceTransformer(LOCATION, device="cpu", local_files_only=True)


def options(cache_dir: Path, dtype: str = "auto") -> LoadOptions:
    return LoadOptions(local=True, threads=1, cache_dir=cache_dir, dtype=dtype)


def convert(source: SentenceTransformer, folder: Path) -> Path:
    return converted(source, folder, reference=lambda: np.ones((1, 2), np.float32))


def embed(backend: TorchBackend, texts: Sequence[str]) -> NDArray[np.float32]:
    return backend.embed(backend.tokenize(texts, prompt="", direction="right"))


@pytest.mark.parametrize(("dtype", "floor"), [("float32", 0.999999), ("bfloat16", 0.9995)])
def test_vectors_are_those_of_encode_within_the_dtypes_rounding(cache_dir: Path, dtype: str, floor: float) -> None:
    backend = auto.load_openvino(LOCATION, options(cache_dir, dtype))
    expected = model().encode(TEXTS)
    alone = np.concatenate([embed(backend, [text]) for text in TEXTS])
    for found in (alone, embed(backend, TEXTS)):
        assert selftest.lowest_cosine(found, expected) >= floor
    assert backend.self_test is not None
    assert backend.self_test >= selftest.COSINE_FLOOR[dtype]
    assert (backend.name, backend.dtype) == ("openvino", dtype)


def test_backends_and_dtypes_have_fingerprints_of_their_own(cache_dir: Path) -> None:
    torch, openvino = TorchBackend(model()), auto.load_openvino(LOCATION, options(cache_dir, "float32"))
    assert torch.identity() != openvino.identity()
    assert auto.load_openvino(LOCATION, options(cache_dir, "float32")).identity() == openvino.identity()


def test_a_model_is_converted_once_however_many_replicas_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = model()
    with caplog.at_level(logging.INFO, "ml_base"), ThreadPoolExecutor(3) as replicas:
        folders = list(replicas.map(lambda _: convert(source, tmp_path / "digest"), range(3)))
    assert len(set(folders)) == 1
    assert sum("converted" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("name", ["model.bin", "model.xml", "reference.npy", "sha256.json"])
def test_a_damaged_conversion_is_made_again(cache_dir: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "digest"
    [kept] = (folder for folder in (cache_dir / "openvino").iterdir() if folder.is_dir())
    shutil.copytree(kept, folder)
    damaged = folder / name
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(bytes(content))
    convert(model(), folder)
    assert damaged.read_bytes() != bytes(content)


def _flip_pooling(broken: Any) -> None:
    broken[1].pooling_mode = ("cls",)


def _cut_at_ten(broken: Any) -> None:
    tokenize = broken.tokenize
    broken.tokenize = lambda texts, **rest: [_shortened(one) for one in tokenize(texts, **rest)]


def _shortened(text: Any) -> Any:
    features = {name: values[:10] for name, values in text.features.items()}
    return type(text)(features, text.tokens, text.truncated, text.prompt_tokens)


def test_the_self_test_catches_another_pooling(cache_dir: Path) -> None:
    source = model()
    expected = selftest.vectors(TorchBackend(source))
    _flip_pooling(source)
    broken = OpenVinoBackend(source, dtype="float32", threads=1, cache_dir=cache_dir)
    with pytest.raises(UnsupportedModelError, match="self-test of openvino in float32 found a cosine of"):
        auto.check(broken, expected)


def test_the_self_test_catches_a_wrong_length(cache_dir: Path) -> None:
    broken = OpenVinoBackend(model(), dtype="float32", threads=1, cache_dir=cache_dir)
    _cut_at_ten(broken)
    with pytest.raises(UnsupportedModelError, match="self-test"):
        auto.check(broken, selftest.vectors(TorchBackend(model())))


def test_no_number_at_all_is_no_match() -> None:
    good = np.ones((2, 3), np.float32)
    assert selftest.lowest_cosine(good * np.nan, good) == 0
    assert selftest.lowest_cosine(good[:1], good) == 0


def test_without_a_place_for_the_conversion_torch_serves_and_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    backend = auto.load(LOCATION, options(blocked))
    assert (backend.name, backend.dtype, backend.self_test) == ("torch", "float32", None)
    assert "the converted model cannot be kept in" in caplog.text
    with pytest.raises(UnsupportedModelError):
        auto.load(LOCATION, options(blocked, "bfloat16"))


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [("fpu avx512_bf16 sse", "bfloat16"), ("fpu amx_bf16", "bfloat16"), ("fpu avx512f", "float32"), ("", "float32")],
)
def test_bfloat16_is_chosen_where_the_cpu_has_it(tmp_path: Path, flags: str, dtype: str) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    assert auto.fastest_dtype(cpuinfo) == dtype
    assert auto.fastest_dtype(tmp_path / "missing") == "float32"
