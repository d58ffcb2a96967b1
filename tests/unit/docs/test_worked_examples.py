"""The worked examples of docs/contributing.md run as they stand there."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from embedding_service.api import framework, routes
from ml_base.backends import LoadOptions, UnsupportedModelError
from tests.support.documents import ROOT, python_blocks
from tests.support.gateway_client import Client
from tests.support.tiny_model import DIMENSION, save_tiny

if TYPE_CHECKING:
    from pathlib import Path

DOCUMENT = ROOT / "docs" / "contributing.md"


def module(name: str, source: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns the module that the block would be as a file."""
    made = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, made)  # pydantic looks there for the names in annotations
    exec(compile(source, str(DOCUMENT), "exec"), made.__dict__)
    return made


@pytest.fixture
def acme_dialect(monkeypatch: pytest.MonkeyPatch) -> Any:
    source, row = python_blocks(DOCUMENT, "How to add a dialect")
    acme = module("embedding_service.api.dialects.acme", source, monkeypatch)
    table = (*routes.ROUTES, eval(row, {"Route": routes.Route, "acme": acme}))
    for place in (routes, framework):
        monkeypatch.setattr(place, "ROUTES", table)
    return acme


async def test_the_dialect_answers_refuses_and_is_documented(acme_dialect: Any) -> None:
    client = Client()
    try:
        for example in acme_dialect.EXAMPLES.values():
            answer = await client.http.post("/acme", json=example)
            assert answer.status_code == 200, answer.text
            reply = acme_dialect.AcmeReply.model_validate(answer.json())
            assert [len(vector) for vector in reply.vectors] == [2]
        for wrong in ({}, {"prompts": []}, {"prompts": ["word " * 100]}, {"prompts": ["a"] * 301}):
            refused = await client.http.post("/acme", json=wrong)
            assert refused.status_code == 422, wrong
            assert refused.json()["field"].startswith("prompts")
        assert "/acme" in (await client.http.get("/openapi.json")).json()["paths"]
    finally:
        await client.close()


class Runtime(ModuleType):
    """A library that "compiles" a transformer by calling it, and multiplies what it computes by `factor`."""

    __version__ = "1.0"
    factor = 1.0

    def compile(self, transformer: Any, *, threads: int) -> Any:
        import torch  # noqa: PLC0415 - seconds, which the other test does not need

        assert threads == 1
        compute = transformer.forward

        def compiled(ids: Any, mask: Any) -> Any:
            told = compute(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask))
            return (told.last_hidden_state * self.factor).numpy()

        return compiled


def test_the_backend_loads_passes_its_self_test_and_refuses_wrong_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [source] = python_blocks(DOCUMENT, "How to add a backend")
    runtime = Runtime("acme_runtime")
    monkeypatch.setitem(sys.modules, "acme_runtime", runtime)
    acme = module("ml_base.backends.acme", source, monkeypatch)
    folder, options = str(save_tiny(tmp_path / "tiny")), LoadOptions(local=True, threads=1, cache_dir=tmp_path)
    backend = acme.load(folder, options)
    assert backend.name == "acme"
    assert backend.self_test > 0.99999
    assert backend.embed(backend.tokenize(["hello"], prompt="", direction="right")).shape == (1, DIMENSION)

    runtime.factor = float("nan")
    with pytest.raises(UnsupportedModelError, match="self-test"):
        acme.load(folder, options)
