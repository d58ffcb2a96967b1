"""Finds how many cores this process has by affinity mask and cgroup quota, shared out over the replicas of the host."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class Threads:
    """How many threads compute, the reason for the log, and how many threads of all replicas share a core."""

    count: int
    reason: str
    per_core: float = 1.0


def choose(*, wanted: int | None, replicas: int) -> Threads:
    """Returns `wanted` threads if given, else the cores of this process divided over `replicas`, at least one."""
    allowed = len(os.sched_getaffinity(0))
    quota = read_quota(_CGROUP_ROOT, _OWN_CGROUP)
    return share_out(wanted=wanted, allowed=allowed, quota=quota, replicas=replicas)


def share_out(*, wanted: int | None = None, allowed: int, quota: float | None, replicas: int) -> Threads:
    """Divides cores into threads. A quota of 1.5 cores gives one thread: a second would be throttled within a batch."""
    cores = allowed if quota is None else min(allowed, quota)
    limit = "no cgroup quota" if quota is None else f"cgroup quota of {quota:g} cores"
    count = wanted or max(1, int(cores / replicas))
    reason = f"{allowed} cores allowed, {limit}, {replicas} replicas on this host"
    return Threads(
        count, "set by ML_BASE_THREADS" if wanted else reason, per_core=max(1.0, count * replicas / max(cores, 1))
    )


def environment(count: int) -> dict[str, str]:
    """Returns the variables that the numeric libraries read when they are imported; after that it is too late.

    The tokenizer's own thread pool is off: it would take a core from the inference thread for a gain of microseconds.
    """
    return {"OMP_NUM_THREADS": str(count), "MKL_NUM_THREADS": str(count), "TOKENIZERS_PARALLELISM": "false"}


def read_quota(root: Path, own_cgroup: Path) -> float | None:
    """Returns the cores of the tightest CPU quota from this process's cgroup up to the root, or None."""
    quotas = [quota for folder in _folders(root, _read(own_cgroup)) if (quota := _folder_quota(folder)) is not None]
    return min(quotas, default=None)


def _folders(root: Path, own_cgroup: str) -> Iterable[Path]:
    """Yields each folder that may hold our limit. In a container our own path is often not mounted: root counts."""
    for line in own_cgroup.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root if not controllers else root / "cpu"
        own = base / path.lstrip("/")
        yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(base))
    yield root
    yield root / "cpu"


def _folder_quota(folder: Path) -> float | None:
    unified = parse_cpu_max(_read(folder / "cpu.max"))
    if unified is not None:
        return unified
    return parse_cfs(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))


def parse_cpu_max(text: str) -> float | None:
    """Returns the cores of cgroup v2's "<quota> <period>" in microseconds, or None for "max <period>"."""
    fields = text.split()
    if len(fields) != 2:  # noqa: PLR2004 - the format has two fields
        return None
    return parse_cfs(fields[0], fields[1])


def parse_cfs(quota_us: str, period_us: str) -> float | None:
    """Returns the cores of two numbers in microseconds, as cgroup v1 keeps them in two files; a quota of -1 is none."""
    try:
        quota, period = int(quota_us), int(period_us)
    except ValueError:
        return None
    return quota / period if quota > 0 and period > 0 else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
