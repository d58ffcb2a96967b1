"""Words that readers stumble over stand nowhere in code, configuration or documents."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLACES = ("embedding_common", "embedding_service", "ml_base", "scripts", "haproxy", "compose", "docs", ".ci")
SUFFIXES = {".py", ".md", ".yml", ".cfg", ".sh", ""}
FOUND = [*ROOT.glob("*.md"), *ROOT.glob("Dockerfile.*"), *(p for place in PLACES for p in (ROOT / place).rglob("*"))]
FILES = sorted(
    path
    for path in FOUND
    if path.is_file() and path.suffix in SUFFIXES | {".embedding", ".mlbase"} and "__pycache__" not in path.parts
)
PRONOUNS = ("who" + "ever", "no" + "body", "some" + "body")
ODD = re.compile(rf'\b({"|".join(PRONOUNS)})|"""Of ', re.IGNORECASE)
SAYS_THEM = {"docs/contributing.md"}  # it names the words that are not used


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_in_plain_words(path: Path) -> None:
    if str(path.relative_to(ROOT)) in SAYS_THEM:
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [f"{number}: {line.strip()}" for number, line in enumerate(lines, 1) if ODD.search(line)] == []
