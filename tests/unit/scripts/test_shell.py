"""The shell scripts find their own project, whatever the caller's shell is set up for."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[3]
GROUPS = ("clients", "dev", "test")
DOCKER = """#!/bin/sh
pwd >&2
case "$1 $2 $3" in
  "compose ps --all") echo container; if [ -e "$0.up" ]; then echo successor; fi ;;
  "compose ps --quiet") echo container ;;
  "compose up --detach") touch "$0.up" ;;
  inspect*) echo "healthy 0" ;;
esac
"""


def printed(command: str, *, cwd: Path = ROOT, **env: str) -> str:
    run = subprocess.run(
        ["bash", "-c", command], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=True
    )
    return run.stdout


def test_an_exported_cdpath_does_not_lead_the_scripts_into_another_project(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    for cdpath in (".", str(tmp_path)):
        assert printed('source scripts/_venv.sh; echo "$root"', CDPATH=cdpath) == f"{ROOT}\n"


def test_an_exported_cdpath_does_not_make_roll_replace_the_containers_of_another_project(tmp_path: Path) -> None:
    (tmp_path / "other" / "scripts").mkdir(parents=True)
    docker = tmp_path / "docker"
    docker.write_text(DOCKER)
    docker.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    run = printed("scripts/roll 2>&1", CDPATH=str(tmp_path / "other"), PATH=path)
    assert set(run.split("\n")) - {"", "container"} == {str(ROOT)}


@pytest.mark.parametrize("script", ["roll", "test"])
def test_help_is_told_from_any_folder(script: str) -> None:
    assert printed(f"{ROOT.name}/scripts/{script} --help", cwd=ROOT.parent).startswith(f"scripts/{script} [")


def test_the_requirements_of_a_group_hold_those_of_the_groups_that_it_includes() -> None:
    told = {name: set(printed(f"source scripts/_venv.sh; requirements_of {name}").splitlines()) for name in GROUPS}
    assert told["dev"] == told["test"] | told["clients"]
    assert all(Requirement(text) for texts in told.values() for text in texts)
