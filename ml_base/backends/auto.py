"""The fastest backend that computes the model: OpenVINO if it passes the self-test beside torch, else torch itself."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ml_base import selftest
from ml_base.backends import UnsupportedModelError
from ml_base.backends.torch import TorchBackend, open_model

if TYPE_CHECKING:
    from ml_base.backends import Backend, LoadOptions

log = logging.getLogger(__name__)

_CPUINFO = Path("/proc/cpuinfo")
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}


def load(name_or_path: str, options: LoadOptions) -> Backend:
    """Falls back to torch in float32 with a warning, unless a dtype was asked for that torch does not serve."""
    try:
        return load_openvino(name_or_path, options)
    except UnsupportedModelError as problem:
        if options.dtype == "bfloat16":
            raise
        log.warning("torch float32 is used: %s", problem)
    return TorchBackend(open_model(name_or_path, options))


def load_openvino(name_or_path: str, options: LoadOptions) -> Backend:
    """Raises `UnsupportedModelError` if OpenVINO is missing, cannot convert the model, or computes something else."""
    try:
        from ml_base.backends.openvino import OpenVinoBackend  # noqa: PLC0415 - optional, and a third of a second
    except ImportError as missing:
        raise UnsupportedModelError(f"OpenVINO is not installed ({missing})") from None
    model = open_model(name_or_path, options)
    dtype = options.dtype if options.dtype != "auto" else fastest_dtype(_CPUINFO)
    backend = OpenVinoBackend(model, dtype=dtype, threads=options.threads, cache_dir=options.cache_dir)
    backend.self_test = check(backend, backend.reference)
    return backend


def check(backend: Backend, expected: selftest.Vectors) -> float:
    """The lowest cosine to the reference. Raises `UnsupportedModelError` if it is below the floor of the dtype."""
    lowest = selftest.lowest_cosine(selftest.vectors(backend), expected)
    floor = selftest.COSINE_FLOOR[backend.dtype]
    if lowest < floor:
        raise UnsupportedModelError(
            f"the self-test of {backend.name} in {backend.dtype} found a cosine of {lowest:.5f} to torch in float32, "
            f"at least {floor} is demanded"
        )
    log.info("self-test of %s in %s: lowest cosine %.6f", backend.name, backend.dtype, lowest)
    return lowest


def fastest_dtype(cpuinfo: Path) -> str:
    """bfloat16 where the CPU multiplies it natively; emulated, it is slower than float32."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return "float32"
    flags = next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())
    return "bfloat16" if flags & _BFLOAT16_FLAGS else "float32"
