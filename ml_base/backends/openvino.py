"""The backend whose transformer is computed by OpenVINO; tokenizer, pooling, normalisation and prompts stay.

Converting takes seconds, so the result is kept on disk under the digest of what was converted, together with the
vectors that torch computes for the texts of the self-test. It is written to a folder of its own and renamed into place
while a lock is held, so that replicas which start at once convert it once and none ever reads half of it. Its checksums
are verified at every load.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import shutil
import warnings
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino
import torch

from ml_base.backends import UnsupportedModelError, selftest
from ml_base.backends.quantize import Quantizer
from ml_base.backends.torch import TorchBackend
from ml_base.batching.batches import Grid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from sentence_transformers import SentenceTransformer

log = logging.getLogger(__name__)

_PRECISION = {"float32": "f32", "bfloat16": "bf16"}

_OUTPUT = "last_hidden_state"

_REFERENCE = "reference.npy"
_FILES = ("model.xml", "model.bin", _REFERENCE)
_MANIFEST = "sha256.json"


class OpenVinoBackend(TorchBackend):
    """Computes vectors within rounding of the torch backend's; `selftest` measures how near, at every load."""

    name = "openvino"

    def __init__(
        self,
        model: SentenceTransformer,
        *,
        dtype: str,
        precision: str,
        threads: int,
        cache_dir: Path,
        baked_dir: Path | None = None,
    ) -> None:
        """`precision` is the dtype of all that `dtype` does not cover: int8 covers the matrix products only."""
        super().__init__(model)
        self._identity += str(openvino.__version__).encode()
        quantize = None
        if dtype == "int8":
            quantize = Quantizer(self)
            self._identity += quantize.identity
        name = f"openvino/{hashlib.sha256(self._identity).hexdigest()[:32]}"
        if baked_dir is not None and _intact(baked_dir / name):
            folder = baked_dir / name
        else:
            reference = partial(selftest.vectors, self)
            folder = converted(model, cache_dir / name, reference=reference, quantize=quantize)
            self._take_tokenizer()
        self.reference: selftest.Vectors = np.load(folder / _REFERENCE, allow_pickle=False)
        self._replace_transformer(_compile(folder, threads=threads, precision=precision))
        if precision != dtype:  # one conversion serves every CPU, but its vectors differ: up to 0.002 of cosine
            self._identity += precision.encode()
        self.dtype = dtype
        self.grid = Grid.up_to(self.max_tokens)

    def __repr__(self) -> str:
        return f"<OpenVinoBackend {self.dtype} max_tokens={self.max_tokens}>"

    def _replace_transformer(self, compiled: Any) -> None:
        names = [port.any_name for port in compiled.inputs]
        request = compiled.create_infer_request()  # one is enough: only the inference thread comes here

        def forward(features: dict[str, Any], **_: Any) -> dict[str, Any]:
            inputs = {name: features[name].numpy() for name in names}
            hidden = request.infer(inputs, share_inputs=True)[_OUTPUT]  # a copy: outputs are not shared
            return features | {"token_embeddings": torch.from_numpy(hidden)}

        transformer: Any = self._model[0]
        transformer.forward = forward
        transformer.auto_model.to("meta")  # its weights are used no more, and need no second copy


def _compile(folder: Path, *, threads: int, precision: str) -> Any:
    settings = {
        "INFERENCE_PRECISION_HINT": _PRECISION[precision],  # always named: the default depends on the CPU
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # it pins the threads of every replica to the same first cores (measured)
    }
    try:
        return openvino.Core().compile_model(folder / _FILES[0], "CPU", settings)
    except RuntimeError as problem:
        raise UnsupportedModelError(f"OpenVINO cannot compile the model: {_first_line(problem)}") from None


def converted(
    model: SentenceTransformer,
    folder: Path,
    *,
    reference: Callable[[], selftest.Vectors],
    quantize: Callable[[openvino.Model], openvino.Model] | None = None,
) -> Path:
    """Returns the folder of the converted transformer, made if it is missing or damaged.

    Raises `UnsupportedModelError`. `reference` is called while `model` still computes with torch.
    """
    if _intact(folder):  # it may be where nothing can be written, not even a lock
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            if not _intact(folder):
                _convert(model, folder, reference(), quantize)
    except OSError as problem:
        raise UnsupportedModelError(
            f"the converted model cannot be kept in {folder.parent}: {problem.strerror}"
        ) from None
    return folder


def _convert(
    model: SentenceTransformer,
    folder: Path,
    reference: selftest.Vectors,
    quantize: Callable[[openvino.Model], openvino.Model] | None,
) -> None:
    new = folder.with_suffix(".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    features = model.preprocess(["a", "a longer example"])
    example = {name: value for name, value in features.items() if isinstance(value, torch.Tensor)}
    transformer: Any = model[0]
    try:
        with warnings.catch_warnings():
            # tracing warns of every branch it fixes, and of itself; the self-test shows whether any of it mattered
            warnings.simplefilter("ignore")
            graph = openvino.convert_model(transformer.auto_model, example_input=example)
            # without unused parts: the pooler that BERT has of its own takes 3 % of a short query
            graph = openvino.Model([graph.output(_OUTPUT).get_node()], graph.get_parameters())
            if quantize is not None:
                graph = quantize(graph)
        openvino.save_model(graph, new / _FILES[0], compress_to_fp16=False)  # by default it is, which costs digits
    except UnsupportedModelError:
        raise
    except Exception as problem:  # tracing a model may raise anything
        raise UnsupportedModelError(f"OpenVINO cannot convert the model: {_first_line(problem)}") from problem
    np.save(new / _REFERENCE, reference, allow_pickle=False)
    (new / _MANIFEST).write_text(json.dumps(_checksums(new)))
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    log.info("converted the model for OpenVINO into %s", folder)


def _intact(folder: Path) -> bool:
    try:
        expected = json.loads((folder / _MANIFEST).read_text())
        return bool(expected == _checksums(folder))
    except (OSError, ValueError):
        return False


def _checksums(folder: Path) -> dict[str, str]:
    sums = {}
    for name in _FILES:
        with (folder / name).open("rb") as file:
            sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lets one process in at a time; the kernel frees the lock of one that dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _first_line(problem: Exception) -> str:
    return str(problem).strip().partition("\n")[0][:300]
