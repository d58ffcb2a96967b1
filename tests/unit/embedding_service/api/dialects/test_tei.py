"""The dialect of text-embeddings-inference on the wire, between fake replicas and a fake Redis."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from embedding_common import native, refusals
from embedding_service.api.dialects import tei
from embedding_service.errors import InferenceFailed, Problem
from tests.support.gateway import CARD, model

if TYPE_CHECKING:
    from tests.support.gateway_client import Client


def unit(text: str) -> Any:
    return model(text, CARD) / np.linalg.norm(model(text, CARD))


@pytest.mark.parametrize("path", ["/embed", "/embed/", "/"])
@pytest.mark.parametrize("given", ["a", ["a"], ["a", ""]])
async def test_a_reply_is_a_bare_list_of_vectors(client: Client, path: str, given: Any) -> None:
    texts = [given] if isinstance(given, str) else given
    np.testing.assert_allclose((await client.tei(given, path)).json(), [unit(text) for text in texts], rtol=1e-6)


async def test_options_are_those_of_the_other_dialects(client: Client) -> None:
    own = (await client.tei("a", normalize=False, truncate=None, truncation_direction="right", dimensions=3)).json()
    np.testing.assert_array_equal(own, [model("a", CARD)[:3]])
    await client.tei("a", prompt_name="query")
    assert client.gateway.balancer.sent[-1].body["prompt_name"] == "query"


BAD: dict[str, tuple[Any, int, str, str]] = {
    "empty list": ({"inputs": []}, 400, "inputs", "Empty"),
    "null": ({"inputs": None}, 422, "inputs", "Validation"),
    "a number": ({"inputs": 7}, 422, "inputs", "Validation"),
    "token ids": ({"inputs": [[1, 2]]}, 422, "inputs", "Validation"),
    "mixed": ({"inputs": ["a", None]}, 422, "inputs[1]", "Validation"),
    "too many": ({"inputs": ["a"] * 301}, 422, "inputs", "Validation"),
    "too long a text": ({"inputs": ["b" * 401]}, 422, "inputs[0]", "Validation"),
    "too many dimensions": ({"inputs": "a", "dimensions": 5}, 422, "dimensions", "Validation"),
    "must not be cut": ({"inputs": ["a", "word " * 40], "truncate": False}, 422, "inputs[1]", "Validation"),
    "unknown prompt": ({"inputs": "a", "prompt_name": "x"}, 422, "prompt_name", "Validation"),
    "unknown model": ({"inputs": "a", "model": "x"}, 404, "model", "Validation"),
    "not an object": (["inputs"], 422, "body", "Validation"),
}


@pytest.mark.parametrize("case", BAD)
async def test_a_refusal_is_a_string_with_teis_status_and_type(client: Client, case: str) -> None:
    body, status, field, error_type = BAD[case]
    reply = await client.http.post("/embed", json=body)
    told = reply.json()
    assert (reply.status_code, told["field"], told["error_type"]) == (status, field, error_type)
    assert told["error"].startswith(field)


async def test_in_strict_mode_an_empty_text_is_refused_as_tei_refuses_it(strict: Client) -> None:
    reply = await strict.tei(["a", ""])
    assert (reply.status_code, reply.json()["error_type"], reply.json()["field"]) == (400, "Empty", "inputs[1]")
    assert (await strict.tei(["a"])).status_code == 200


async def test_a_broken_replica_is_a_424(client: Client) -> None:
    client.gateway.balancer.answers_at_once = False
    client.gateway.balancer.fails_with = (500, b'{"error": "the model broke"}')
    reply = await client.tei("a")
    assert (reply.status_code, reply.json()["error_type"]) == (424, "Backend")


async def test_tokens_come_from_the_replicas_with_their_places(client: Client) -> None:
    [tokens] = (await client.tei(["hello big"], "/tokenize")).json()
    assert tokens == [
        {"id": 0, "text": "[CLS]", "special": True, "start": None, "stop": None},
        {"id": 1, "text": "hello", "special": False, "start": 0, "stop": 5},
        {"id": 2, "text": "big", "special": False, "start": 6, "stop": 9},
    ]


async def test_special_tokens_may_be_left_out(client: Client) -> None:
    [tokens] = (await client.tei("hello", "/tokenize/", add_special_tokens=False)).json()
    assert [token["text"] for token in tokens] == ["hello"]


async def test_no_more_is_tokenized_than_a_reply_could_tell_of(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "MAX_TOKENIZE_BYTES", 10)
    reply = await client.tei(["hello", "again", "x"], "/tokenize")
    assert (reply.status_code, reply.json()["field"], reply.json()["limit"]) == (413, "inputs", 10)


@pytest.mark.parametrize(("fields", "status"), [({"inputs": []}, 400), ({}, 422), ({"inputs": "a", "model": "x"}, 404)])
async def test_what_cannot_be_tokenized_is_told_as_in_teis_other_routes(
    client: Client, fields: dict[str, Any], status: int
) -> None:
    reply = await client.http.post("/tokenize", json=fields)
    assert reply.status_code == status
    assert isinstance(reply.json()["error"], str)


async def test_info_has_what_teis_clients_look_for(client: Client) -> None:
    info = (await client.http.get("/info")).json()
    assert (info["model_id"], info["max_input_length"], info["max_client_batch_size"]) == ("model", 16, 300)
    assert next(iter(info["model_type"])) == "embedding"
    assert info["auto_truncate"] is True


@pytest.mark.parametrize(
    ("pooling", "theirs"), [("mean", "mean"), ("lasttoken", "last_token"), ("cls+max", "cls+max"), ("", None)]
)
async def test_info_names_the_pooling_in_teis_words(client: Client, pooling: str, theirs: str | None) -> None:
    client.gateway.catalog.adopt(replace(CARD, pooling=pooling))
    info = (await client.http.get("/info")).json()
    assert info["model_type"]["embedding"]["pooling"] == theirs


@pytest.mark.parametrize("path", ["/", "/ping", "/health", "/healthz"])
async def test_health_is_found_wherever_clients_look(client: Client, path: str) -> None:
    assert (await client.http.get(path)).status_code == 200
    client.gateway.catalog.lost()
    assert (await client.http.get(path)).status_code == 503


def test_every_problem_has_a_row_in_both_tables() -> None:
    assert set(Problem.__subclasses__()) == set(tei.STATUS) == set(refusals.STATUS)
    assert {kind for kind in tei.STATUS if tei.STATUS[kind] != refusals.STATUS[kind]} >= {InferenceFailed}
