"""The documents are true: their files, names, links, commands and requests."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

import orjson
import pytest

from embedding_common.settings import variables
from embedding_service.config import Settings as GatewaySettings
from ml_base.config import Settings as ReplicaSettings
from tests.support.documents import DOCUMENTS, ROOT, body_of, commands, curl, shown_reply
from tests.support.gateway_client import Client

if TYPE_CHECKING:
    from pathlib import Path

NAMED = re.compile(r"`((?:embedding_\w+|ml_base|scripts|tests|docs|haproxy|compose|\.ci)/[\w./-]*)[^`]*`")
AT_THE_ROOT = re.compile(r"`([\w.-]+\.(?:md|toml|txt|yaml)|\.env\.example|\.ci/run)`")
SYMBOLS = re.compile(r"((?:`[\w.]+`(?:, | and )?)+) (?:in|of) `([\w/]+\.py)`")  # `name` in `folder/file.py`
VARIABLE = re.compile(r"`((?:ML_BASE|EMBEDDING|REDIS|MAX|API|ADMIN)_[A-Z_]+)(?:=[^`]*)?`")
OTHERS = {
    "ML_BASE_BAKED_MODELS",
    "ML_BASE_REPLICAS",
    "ML_BASE_ADDR",
    "EMBEDDING_API_KEY",
    "EMBEDDING_API_KEY_FILE",
}
NOT_YET = re.compile(r"acme|NAME")  # what the reader of an example is to make

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160


@every_document
def test_every_file_that_a_document_names_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = [name for name in NAMED.findall(text) + AT_THE_ROOT.findall(text) if not NOT_YET.search(name)]
    folders = (ROOT, document.parent, ROOT / "compose")
    assert [name for name in named if not any((folder / name).exists() for folder in folders)] == []


@every_document
def test_every_name_that_a_document_places_in_a_file_stands_there(document: Path) -> None:
    for names, file in SYMBOLS.findall(document.read_text(encoding="utf-8")):
        if "/" not in file or NOT_YET.search(file):
            continue
        source = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"`([\w.]+)`", names):
            assert re.search(rf"\b{name.rpartition('.')[2]}\b", source), f"{name} is not in {file}"


@every_document
def test_every_variable_that_a_document_names_exists(document: Path) -> None:
    known = {one.name for kind in (GatewaySettings, ReplicaSettings) for one in variables(kind)} | OTHERS
    assert set(VARIABLE.findall(document.read_text(encoding="utf-8"))) <= known


@every_document
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
    document = ROOT / "README.md"
    body, shown = body_of(curl(document)), shown_reply(document)
    for cached in (0, 1):
        answer = (await client.http.post("/embed", json=body)).json()
        assert list(answer) == list(shown)
        assert answer["cached_count"] == cached, "README says so"


async def test_the_request_of_the_api_gets_the_answer_that_is_shown(client: Client) -> None:
    document = ROOT / "docs" / "api.md"
    shown = shown_reply(document)
    answer = (await client.http.post("/embed", json=body_of(curl(document)))).json()
    assert list(answer) == list(shown)
    for field in ("dimension", "cached_count", "batch_size"):
        assert answer[field] == shown[field]
    assert [len(vector) for vector in answer["embeddings"]] == [len(vector) for vector in shown["embeddings"]]


async def test_the_refusal_of_the_api_is_the_one_that_is_shown() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    [(status, body)] = re.findall(r"^    HTTP (\d+) (\{.*\})$", text, re.MULTILINE)
    shown = orjson.loads(body)
    client = Client(GatewaySettings())
    try:
        answer = await client.embed(*["text"] * shown["value"])
    finally:
        await client.close()
    assert answer.status_code == int(status)
    assert answer.json() == shown | {"request_id": answer.headers["x-request-id"]}


def test_the_page_of_settings_is_the_one_that_the_classes_give() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import generate_configuration  # noqa: PLC0415 - found only now
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == generate_configuration.page(), "run .venv/bin/python scripts/generate_configuration.py"
