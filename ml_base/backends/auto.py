"""Chooses the fastest backend that computes the model: OpenVINO if it passes the self-test, else torch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ml_base.backends import UnsupportedModelError, selftest
from ml_base.backends.torch import TorchBackend, find_device, open_model
from ml_base.backends.torch import load as load_torch

if TYPE_CHECKING:
    from ml_base.backends import Backend, LoadOptions

log = logging.getLogger(__name__)

_CPUINFO = Path("/proc/cpuinfo")
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}


def load(name_or_path: str, options: LoadOptions) -> Backend:
    """Loads on torch for CUDA, else on OpenVINO; without that, on torch in float32 with a warning.

    Raises `UnsupportedModelError` if another dtype was asked for then.
    """
    if find_device(options.device) == "cuda":
        return load_torch(name_or_path, options)
    try:
        return load_openvino(name_or_path, options)
    except UnsupportedModelError as problem:
        if options.dtype not in ("auto", "float32"):
            raise
        log.warning("torch float32 is used: %s", problem)
    return TorchBackend(open_model(name_or_path, options))


def load_openvino(name_or_path: str, options: LoadOptions) -> Backend:
    """Loads on OpenVINO.

    Raises `UnsupportedModelError` if OpenVINO is missing, cannot convert the model, or computes other vectors.
    """
    try:
        from ml_base.backends.openvino import OpenVinoBackend  # noqa: PLC0415 - optional, and a third of a second
    except ImportError as missing:
        raise UnsupportedModelError(f"OpenVINO is not installed ({missing})") from None
    if options.device == "cuda":
        raise UnsupportedModelError("the openvino backend computes on the CPU, not on cuda")
    if options.dtype == "float16":
        raise UnsupportedModelError("the openvino backend computes in float32, bfloat16 and int8, not in float16")
    fastest = fastest_dtype(_CPUINFO)

    def tested(dtype: str) -> Backend:
        model = open_model(name_or_path, options)
        precision = fastest if dtype == "int8" else dtype
        backend = OpenVinoBackend(
            model,
            dtype=dtype,
            precision=precision,
            threads=options.threads,
            cache_dir=options.cache_dir,
            baked_dir=options.baked_dir,
        )
        backend.self_test = selftest.check(backend, backend.reference)
        return backend

    if options.dtype != "auto":
        return tested(options.dtype)
    if fastest != "float32":
        try:
            return tested(fastest)
        except UnsupportedModelError as problem:
            log.warning("float32 is used: %s", problem)
    return tested("float32")


def fastest_dtype(cpuinfo: Path) -> str:
    """Returns bfloat16 where the CPU multiplies it natively; emulated, it is slower than float32."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return "float32"
    flags = next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())
    return "bfloat16" if flags & _BFLOAT16_FLAGS else "float32"
