"""OpenVINO beside torch on the real default model, and what happens to a backend that computes something else."""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino
import pytest
from sentence_transformers import SentenceTransformer

from ml_base.backends import LoadOptions, UnsupportedModelError, auto, selftest
from ml_base.backends.openvino import OpenVinoBackend, converted
from ml_base.backends.torch import TorchBackend
from ml_base.batching.batches import Grid
from ml_base.models.loading import resolve

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from ml_base.backends import Backend, Direction

LOCATION = resolve("all-MiniLM-L6-v2").location
TEXTS = ["", "hello", "two words", "Ünïcode ☃ 日本語", "a paragraph of text, as people write it. " * 6, "word " * 600]


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted once for all tests of this file."""
    return tmp_path_factory.mktemp("converted")


def model() -> SentenceTransformer:
    return SentenceTransformer(LOCATION, device="cpu", local_files_only=True)


@pytest.fixture(scope="module")
def tiny_converted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = SentenceTransformer(str(tiny), device="cpu", local_files_only=True)
    return convert(source, tmp_path_factory.mktemp("tiny") / "digest")


def options(cache_dir: Path, dtype: str = "auto") -> LoadOptions:
    return LoadOptions(local=True, threads=1, cache_dir=cache_dir, dtype=dtype)


def convert(source: SentenceTransformer, folder: Path) -> Path:
    return converted(source, folder, reference=lambda: np.ones((1, 2), np.float32))


def embed(backend: Backend, texts: Sequence[str]) -> NDArray[np.float32]:
    return backend.embed(backend.tokenize(texts, prompt="", direction="right"))


@pytest.mark.parametrize(("dtype", "floor"), [("float32", 0.999999), ("bfloat16", 0.9995)])
def test_vectors_are_those_of_encode_within_the_dtypes_rounding(cache_dir: Path, dtype: str, floor: float) -> None:
    backend = auto.load_openvino(LOCATION, options(cache_dir, dtype))
    expected = model().encode(TEXTS)
    alone = np.concatenate([embed(backend, [text]) for text in TEXTS])
    for found in (alone, embed(backend, TEXTS)):
        assert selftest.likeness(found, expected).lowest >= floor
    assert backend.self_test is not None
    assert backend.self_test >= selftest.FLOOR[dtype].lowest
    assert (backend.name, backend.dtype) == ("openvino", dtype)


def test_int8_is_within_its_floors_on_texts_that_people_write(cache_dir: Path) -> None:
    """Not on one word six hundred times: that has a cosine of 0.93, further off the longer it goes on."""
    backend = auto.load_openvino(LOCATION, options(cache_dir, "int8"))
    assert (backend.name, backend.dtype) == ("openvino", "int8")
    assert backend.self_test is not None
    assert selftest.FLOOR["int8"].lowest <= backend.self_test < 1
    found = selftest.likeness(embed(backend, TEXTS[:-1]), model().encode(TEXTS[:-1]))
    assert found.lowest >= selftest.FLOOR["int8"].lowest


def test_backends_and_dtypes_have_fingerprints_of_their_own(cache_dir: Path) -> None:
    torch, openvino = TorchBackend(model()), auto.load_openvino(LOCATION, options(cache_dir, "float32"))
    int8 = auto.load_openvino(LOCATION, options(cache_dir, "int8"))
    assert len({torch.identity(), openvino.identity(), int8.identity()}) == 3
    converted_as = (openvino.identity(), int8.identity().removesuffix(auto.fastest_dtype(auto._CPUINFO).encode()))
    folders = {hashlib.sha256(identity).hexdigest()[:32] for identity in converted_as}
    assert folders <= {folder.name for folder in (cache_dir / "openvino").iterdir()}
    assert auto.load_openvino(LOCATION, options(cache_dir, "float32")).identity() == openvino.identity()


def test_int8_on_cpus_with_and_without_bfloat16_has_one_conversion_and_two_fingerprints(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identities, folders = set(), []
    for rest in ("bfloat16", "float32"):
        monkeypatch.setattr(auto, "fastest_dtype", lambda _, rest=rest: rest)
        identities.add(auto.load_openvino(LOCATION, options(cache_dir, "int8")).identity())
        folders.append(sorted(cache_dir.glob("openvino/*/model.xml")))
    assert len(identities) == 2
    assert folders[0] == folders[1]


def test_a_model_is_converted_once_however_many_replicas_start(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = SentenceTransformer(str(tiny), device="cpu", local_files_only=True)
    with caplog.at_level(logging.INFO, "ml_base"), ThreadPoolExecutor(3) as replicas:
        folders = list(replicas.map(lambda _: convert(source, tmp_path / "digest"), range(3)))
    assert len(set(folders)) == 1
    assert sum("converted" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("direction", ["left", "right"])
def test_a_model_converted_just_now_reads_texts_like_one_that_was_found_converted(
    tiny: Path, tmp_path: Path, direction: Direction
) -> None:
    just_now, found = (auto.load_openvino(str(tiny), options(tmp_path)) for _ in range(2))
    texts = ["one", "start " * 60 + "end " * 60]
    pieces = just_now.tokenize(texts, prompt="", direction=direction)
    assert pieces == found.tokenize(texts, prompt="", direction=direction)
    assert [(piece.length, piece.tokens, piece.truncated) for piece in pieces] == [(3, 3, False), (64, 122, True)]


def test_unused_outputs_are_not_converted(tiny_converted: Path) -> None:
    [output] = openvino.Core().read_model(tiny_converted / "model.xml").outputs
    assert "last_hidden_state" in output.get_names()


@pytest.mark.parametrize("name", ["model.bin", "model.xml", "reference.npy", "sha256.json"])
def test_a_damaged_conversion_is_made_again(tiny: Path, tiny_converted: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "digest"
    shutil.copytree(tiny_converted, folder)
    damaged = folder / name
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(bytes(content))
    convert(SentenceTransformer(str(tiny), device="cpu", local_files_only=True), folder)
    assert damaged.read_bytes() != bytes(content)


def test_padding_to_the_grid_changes_no_vector(cache_dir: Path) -> None:
    backend: Any = auto.load_openvino(LOCATION, options(cache_dir, "float32"))
    texts = [*TEXTS, "one more", "and another", "nine rows are computed as ten"]
    padded, alone = embed(backend, texts), [embed(backend, [text]) for text in texts]
    backend.grid = Grid()
    for found in (padded, np.concatenate(alone)):
        assert selftest.likeness(found, embed(backend, texts)).lowest > 0.999999


def test_once_it_is_converted_the_weights_of_torch_are_freed(tiny: Path, tmp_path: Path) -> None:
    backend: Any = auto.load_openvino(str(tiny), options(tmp_path, "float32"))
    assert {parameter.device.type for parameter in backend._model[0].parameters()} == {"meta"}


def test_int8_without_its_extra_is_refused_and_leaves_no_model_behind(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(UnsupportedModelError, match=r"^int8 needs nncf: install the extra int8$"):
        auto.load(str(tiny), options(tmp_path, "int8"))
    assert list(tmp_path.rglob("*.xml")) == []


def test_where_bfloat16_fails_its_self_test_float32_serves_and_the_log_has_the_figure(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(auto, "fastest_dtype", lambda _: "bfloat16")
    monkeypatch.setitem(selftest.FLOOR, "bfloat16", selftest.Likeness(1.1, 1.1))
    backend = auto.load(str(tiny), options(tmp_path))
    assert (backend.name, backend.dtype) == ("openvino", "float32")
    [warning] = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert re.match(r"float32 is used: the self-test of openvino in bfloat16 found cosines of [01]\.\d{5} ", warning)


def test_what_openvino_cannot_compute_is_refused_by_name(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="computes in float32, bfloat16 and int8, not in float16"):
        auto.load_openvino(str(tiny), options(tmp_path, "float16"))
    with pytest.raises(UnsupportedModelError, match="computes on the CPU, not on cuda"):
        auto.load_openvino(str(tiny), LoadOptions(local=True, threads=1, cache_dir=tmp_path, device="cuda"))


def test_what_is_converted_but_cannot_be_computed_is_left_to_torch_and_the_log_says_why(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unnamed(backend: Any, _: object) -> None:
        """An input that tracing lost the name of, as it does for Bloom and Mamba."""
        backend._model[0].forward = lambda features: features["45"]

    monkeypatch.setattr(OpenVinoBackend, "_replace_transformer", unnamed)
    assert auto.load(str(tiny), options(tmp_path)).name == "torch"
    assert "torch float32 is used: the self-test of openvino in float32 broke: KeyError: '45'" in caplog.text


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
    broken = OpenVinoBackend(source, dtype="float32", precision="float32", threads=1, cache_dir=cache_dir)
    with pytest.raises(UnsupportedModelError, match="self-test of openvino in float32 found cosines of"):
        selftest.check(broken, expected)


def test_the_self_test_catches_a_wrong_length(cache_dir: Path) -> None:
    broken = OpenVinoBackend(model(), dtype="float32", precision="float32", threads=1, cache_dir=cache_dir)
    _cut_at_ten(broken)
    with pytest.raises(UnsupportedModelError, match="self-test"):
        selftest.check(broken, selftest.vectors(TorchBackend(model())))


def test_no_number_at_all_is_no_match() -> None:
    good = np.ones((2, 3), np.float32)
    assert selftest.likeness(good * np.nan, good) == selftest.Likeness(0, 0)
    assert selftest.likeness(good[:1], good) == selftest.Likeness(0, 0)


@pytest.mark.parametrize(("lowest", "mean", "enough"), [(0.9, 0.95, True), (0.89, 0.99, False), (0.92, 0.94, False)])
def test_both_the_worst_text_and_the_average_have_a_floor(lowest: float, mean: float, enough: bool) -> None:
    assert selftest.Likeness(lowest, mean).reaches(selftest.Likeness(0.9, 0.95)) is enough


def test_a_conversion_in_a_read_only_folder_is_used(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto.load_openvino(str(tiny), options(tmp_path))

    def read_only(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ml_base.backends.openvino._locked", read_only)
    assert auto.load(str(tiny), options(tmp_path)).name == "openvino"


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
