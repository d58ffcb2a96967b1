from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ml_base.machine import threads

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("max 100000\n", None),
        ("150000 100000\n", 1.5),
        ("50000 100000", 0.5),
        ("", None),
        ("nonsense", None),
        ("1 2 3", None),
        ("0 100000", None),
        ("a b", None),
    ],
)
def test_cgroup_v2_says_quota_and_period_in_one_file(text: str, cores: float | None) -> None:
    assert threads.parse_cpu_max(text) == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1\n", None), ("200000\n", 2.0), ("", None)])
def test_cgroup_v1_says_them_in_two(quota: str, cores: float | None) -> None:
    assert threads.parse_cfs(quota, "100000\n") == cores


def cgroups(root: Path, own: str, files: dict[str, str]) -> tuple[Path, Path]:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "own").write_text(own)
    return root, root / "own"


def test_the_tightest_limit_up_to_the_root_counts(tmp_path: Path) -> None:
    files = {
        "kube/pod/box/cpu.max": "max 100000",
        "kube/pod/cpu.max": "300000 100000",
        "kube/cpu.max": "800000 100000",
    }
    assert threads.read_quota(*cgroups(tmp_path, "0::/kube/pod/box\n", files)) == 3.0


def test_inside_a_container_the_limit_stands_at_the_root(tmp_path: Path) -> None:
    assert threads.read_quota(*cgroups(tmp_path, "0::/\n", {"cpu.max": "250000 100000"})) == 2.5


def test_version_one_has_a_folder_for_the_controller(tmp_path: Path) -> None:
    files = {"cpu/docker/x/cpu.cfs_quota_us": "100000", "cpu/docker/x/cpu.cfs_period_us": "50000"}
    own = "5:memory:/docker/x\n4:cpu,cpuacct:/docker/x\n"
    assert threads.read_quota(*cgroups(tmp_path, own, files)) == 2.0


def test_a_path_that_escapes_its_root_is_ignored(tmp_path: Path) -> None:
    assert threads.read_quota(*cgroups(tmp_path, "0::/../../outside\n", {})) is None


def test_no_files_mean_no_quota(tmp_path: Path) -> None:
    assert threads.read_quota(tmp_path, tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("allowed", "quota", "replicas", "count"),
    [(2, None, 3, 1), (8, None, 3, 2), (8, 2.0, 1, 2), (8, 1.5, 1, 1), (2, 16.0, 1, 2), (64, None, 1, 64)],
)
def test_cores_are_shared_out_and_never_less_than_one(
    allowed: int, quota: float | None, replicas: int, count: int
) -> None:
    chosen = threads.share_out(allowed=allowed, quota=quota, replicas=replicas)
    assert chosen.count == count
    assert f"{replicas} replicas" in chosen.reason


def test_the_operator_has_the_last_word() -> None:
    chosen = threads.choose(wanted=5, replicas=3)
    assert (chosen.count, chosen.reason) == (5, "set by ML_BASE_THREADS")


@pytest.mark.parametrize(
    ("wanted", "allowed", "quota", "replicas", "per_core"),
    [(None, 2, None, 3, 1.5), (None, 8, None, 3, 1.0), (4, 2, None, 1, 2.0), (None, 8, 2.0, 3, 1.5), (1, 8, 0.5, 1, 1)],
)
def test_how_many_threads_of_all_replicas_share_a_core(
    wanted: int | None, allowed: int, quota: float | None, replicas: int, per_core: float
) -> None:
    chosen = threads.share_out(wanted=wanted, allowed=allowed, quota=quota, replicas=replicas)
    assert chosen.per_core == per_core


def test_numeric_libraries_are_told_before_they_are_imported() -> None:
    assert threads.environment(2) == {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "false"}
