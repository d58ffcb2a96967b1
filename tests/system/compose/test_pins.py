"""Two builds of one commit install the same: constraints.txt names a version of all that the images install."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[3]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
INSTALLED = [
    *PROJECT["build-system"]["requires"],
    *PROJECT["project"]["dependencies"],
    *EXTRAS["ml-base"],
    *EXTRAS["int8"],
    *EXTRAS["openai-tokens"],
]
PINS = dict(re.findall(r"^([a-z0-9.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


@pytest.mark.parametrize("text", INSTALLED)
def test_a_dependency_is_pinned_within_what_pyproject_allows(text: str) -> None:
    requirement = Requirement(text)
    assert requirement.specifier.contains(PINS[requirement.name.lower()])


def test_the_layer_of_torch_has_the_pinned_torch() -> None:
    assert f" torch=={PINS['torch']}\n" in (ROOT / "Dockerfile.mlbase").read_text()
