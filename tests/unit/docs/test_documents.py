"""The documents are true: their files, links, commands and examples."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from embedding_common.settings import variables
from embedding_service.config import Settings as GatewaySettings
from ml_base.config import Settings as ReplicaSettings

if TYPE_CHECKING:
    from tests.support.gateway_client import Client

ROOT = Path(__file__).resolve().parents[3]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMED = re.compile(r"`((?:embedding_\w+|ml_base|scripts|tests|docs|haproxy|compose|\.ci)/[\w./-]+)`")
CODE = re.compile(r"^(?: {4}|\t)(.+)$", re.MULTILINE)
VARIABLE = re.compile(r"`((?:ML_BASE|EMBEDDING|REDIS|MAX|API|ADMIN)_[A-Z_]+)(?:=[^`]*)?`")
OTHERS = {
    "ML_BASE_BAKED_MODELS",
    "ML_BASE_REPLICAS",
    "ML_BASE_ADDR",
    "EMBEDDING_API_KEY",
    "EMBEDDING_API_KEY_FILE",
}
NOT_YET = re.compile(r"acme|NAME")  # what the reader of an example is to make


def commands(document: Path) -> list[list[str]]:
    """The shell commands that a document shows, without comments and continuations."""
    lines = [line.strip() for line in CODE.findall(document.read_text(encoding="utf-8"))]
    known = ("scripts/", ".venv/bin/python scripts/", "docker compose", "curl ", "embedding-", "ml-base ")
    return [shlex.split(line, comments=True) for line in lines if line.startswith(known)]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_a_document_names_exists(document: Path) -> None:
    named = [name for name in NAMED.findall(document.read_text(encoding="utf-8")) if not NOT_YET.search(name)]
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_variable_that_a_document_names_exists(document: Path) -> None:
    known = {one.name for kind in (GatewaySettings, ReplicaSettings) for one in variables(kind)} | OTHERS
    assert set(VARIABLE.findall(document.read_text(encoding="utf-8"))) <= known


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_of_a_document_starts_a_program_of_the_project(document: Path) -> None:
    for command in commands(document):
        script = command[1] if command[0] == ".venv/bin/python" else command[0]
        if script.startswith("scripts/"):
            assert (ROOT / script).exists(), command
        for argument in command[1:]:
            if argument.startswith("tests/"):
                assert (ROOT / argument).exists(), command


def test_every_link_leads_somewhere() -> None:
    check = subprocess.run(
        [sys.executable, ROOT / "scripts" / "check_links.py"], capture_output=True, text=True, check=False
    )
    assert check.stderr == ""


async def test_the_readmes_request_gets_the_readmes_answer(client: Client) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [curl] = [command for command in commands(ROOT / "README.md") if command[0] == "curl"]
    body: dict[str, Any] = orjson.loads(curl[curl.index("-d") + 1])
    shown = orjson.loads(re.sub(r",\.\.\.", "", text[text.index('{"embeddings"') :].partition("}")[0]) + "}")
    for cached in (0, 1):
        answer = (await client.http.post("/embed", json=body)).json()
        assert list(answer) == list(shown)
        assert answer["cached_count"] == cached, "README says so"


def test_the_page_of_settings_is_the_one_that_the_classes_give() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import generate_configuration  # noqa: PLC0415 - found only now
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == generate_configuration.page(), "run .venv/bin/python scripts/generate_configuration.py"
