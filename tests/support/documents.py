"""What the documents show: their shell commands, their worked examples in Python, and the replies of their requests."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import orjson

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_CODE = re.compile(r"^(?: {4}|\t)(.+)$", re.MULTILINE)
_PYTHON = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PROGRAMS = ("scripts/", ".venv/bin/python scripts/", "docker compose", "curl ", "embedding-", "ml-base ")


def commands(document: Path) -> list[list[str]]:
    """The shell commands that a document shows as code, without comments."""
    lines = [line.strip() for line in _CODE.findall(document.read_text(encoding="utf-8"))]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(_PROGRAMS)]


def curl(document: Path) -> list[str]:
    """The one request that a document shows as a curl command."""
    [command] = [command for command in commands(document) if command[0] == "curl"]
    return command


def body_of(command: list[str]) -> dict[str, Any]:
    """The JSON that a curl command sends."""
    body: dict[str, Any] = orjson.loads(command[command.index("-d") + 1])
    return body


def shown_reply(document: Path) -> dict[str, Any]:
    """The reply to `/embed` that a document shows; vectors may end in `...`."""
    text = document.read_text(encoding="utf-8")
    reply = text[text.index('{"embeddings"') :].partition("}")[0] + "}"
    shown: dict[str, Any] = orjson.loads(reply.replace(",...", ""))
    return shown


def python_blocks(document: Path, heading: str) -> list[str]:
    """The fenced blocks of Python of the section under `heading`, in their order."""
    section = document.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return _PYTHON.findall(section)
