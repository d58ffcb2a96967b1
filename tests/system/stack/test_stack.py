"""The whole path in good weather: real Redis, HAProxy, replicas, gateway, and the operator's scripts."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING

import numpy as np
import orjson
import pytest

from tests.system.stack.client import Client, encode, fresh_texts, paragraphs, run_script

if TYPE_CHECKING:
    from pathlib import Path

    from local_stack.stack import LocalStack

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]

PARAGRAPHS = 2000


def test_vectors_equal_those_of_sentence_transformers(client: Client, tmp_path: Path) -> None:
    texts = ["hello world", "", " ", "Grüße, 世界 🌍", "word " * 600, *paragraphs(40)]
    expected = encode(texts, tmp_path)
    cosines = (client.vectors(texts) * expected).sum(axis=1)
    assert cosines.shape == (len(texts),)
    assert cosines.min() > 0.9999


def test_a_repeated_request_comes_from_the_cache_and_is_the_same(client: Client) -> None:
    texts = fresh_texts(5)
    first, second = client.embed(texts).json(), client.embed(texts).json()
    assert (first["cached_count"], second["cached_count"]) == (0, 5)
    assert first["embeddings"] == second["embeddings"]


def test_duplicates_and_known_texts_in_one_request_keep_their_places(client: Client) -> None:
    known, new = fresh_texts(2)
    client.vectors([known])
    mixed = client.vectors([new, known, new, known])
    assert np.array_equal(mixed[0], mixed[2])
    assert np.array_equal(mixed[1], mixed[3])
    assert np.array_equal(mixed[1], client.vectors([known])[0])


def test_replicas_answer_direct_callers_uncached(stack: LocalStack, client: Client) -> None:
    [text] = fresh_texts(1)
    direct = client._http.post(f"{stack.ml_url}/embed", json={"texts": [text]}).json()
    assert direct["cached_count"] == 0
    assert np.dot(direct["embeddings"][0], client.vectors([text])[0]) > 0.9999


def warm_cache(stack: LocalStack, source: Path, *options: str) -> dict[str, float]:
    code, out, err = run_script("warm_cache.py", source, "--url", stack.url, "--json", "--restart", *options)
    assert code == 0, err
    return dict(json.loads(out.splitlines()[-1]))


def test_a_second_warm_cache_run_is_answered_from_the_cache(stack: LocalStack, client: Client, tmp_path: Path) -> None:
    texts = paragraphs(PARAGRAPHS)
    source = tmp_path / "paragraphs.jsonl"
    source.write_bytes(b"\n".join(map(orjson.dumps, texts)))
    before = client.cache_stats()["total"]

    cold = warm_cache(stack, source, "--out", str(tmp_path / "vectors.npy"))
    warm = warm_cache(stack, source)

    assert cold["failed"] == warm["failed"] == 0
    assert warm["cached"] > 0.99 * PARAGRAPHS
    assert cold["seconds"] > 20 * warm["seconds"]
    after = client.cache_stats()["total"]
    assert after["requests"] - before["requests"] == 2 * PARAGRAPHS
    assert after["failed"] == before["failed"]
    vectors = np.load(tmp_path / "vectors.npy")
    some = list(range(0, PARAGRAPHS, 50))
    assert np.allclose(vectors[some], client.vectors([texts[index] for index in some]), atol=1e-6)


def test_after_a_gateway_restart_redis_answers(stack: LocalStack, client: Client) -> None:
    texts = fresh_texts(20)
    first = client.vectors(texts)
    assert stack.gateway.stop() == 0
    stack.gateway.start()
    stack.gateway.wait_ready()
    again = client.embed(texts).json()
    assert again["cached_count"] == 20
    assert np.array_equal(first, np.array(again["embeddings"], np.float32))
    assert client.cache_stats()["l2"]["hits"] == 20


def test_validate_scaling_passes(stack: LocalStack) -> None:
    code, out, err = run_script("validate_scaling.py", "--url", stack.url, "--stats-url", stack.stats_url, "--json")
    assert code == 0, out + err
    assert json.loads(out)["passed"] is True


def test_clearing_the_cache_empties_both_tiers_and_says_how_many(stack: LocalStack, client: Client) -> None:
    texts = fresh_texts(8)
    client.vectors(texts)
    reply = client.send("POST", "/cache/clear")
    assert reply.status_code == 200, reply.text
    assert client.cache_stats()["l1"]["size"] == 0
    assert client.embed(texts).json()["cached_count"] == 0


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        pytest.param(b'{"texts": []}', 422, "texts", id="empty texts"),
        pytest.param(b'{"texts": "one"}', 422, "texts", id="texts not a list"),
        pytest.param(b'{"texts": [1]}', 422, "texts[0]", id="a text that is no string"),
        pytest.param(b'{"texts": ["a", null]}', 422, "texts[1]", id="a text that is null"),
        pytest.param(b"{}", 422, "texts", id="no texts"),
        pytest.param(b'["a"]', 422, "body", id="not an object"),
        pytest.param(b"", 400, "body", id="no body"),
        pytest.param(b'{"texts": ["a"', 400, "body", id="cut off"),
        pytest.param(b'{"texts": ["\xff\xfe"]}', 400, "body", id="not UTF-8"),
        pytest.param(b'{"texts": ["\\ud800"]}', 400, "body", id="lone surrogate"),
        pytest.param(b'{"texts": ["a"], "model_id": "none-such"}', 404, "model_id", id="unknown model"),
        pytest.param(b'{"texts": ["a"], "cache_ttl_seconds": -1}', 422, "cache_ttl_seconds", id="negative TTL"),
        pytest.param(b'{"texts": ["a"], "cache_ttl_seconds": "1"}', 422, "cache_ttl_seconds", id="TTL a string"),
        pytest.param(b'{"texts": ["a"], "normalize": "yes"}', 422, "normalize", id="normalize a string"),
        pytest.param(b'{"texts": ["a"], "dimensions": 0}', 422, "dimensions", id="no dimensions"),
        pytest.param(b'{"texts": ["a"], "dimensions": 385}', 422, "dimensions", id="too many dimensions"),
        pytest.param(b'{"texts": ["a"], "prompt_name": "none-such"}', 422, "prompt_name", id="unknown prompt"),
        pytest.param(orjson.dumps({"texts": ["a"] * 8193}), 422, "texts", id="too many texts"),
        pytest.param(orjson.dumps({"texts": ["a" * (1 << 20) + "b"]}), 422, "texts[0]", id="too long a text"),
        pytest.param(
            orjson.dumps({"texts": ["word " * 600], "truncate": False}), 422, "texts[0]", id="must not be cut"
        ),
        pytest.param(b'{"texts": ["' + b"a" * (33 << 20) + b'"]}', 413, "body", id="too long a body"),
    ],
)
def test_bad_input_is_refused_by_field_limit_and_value_and_counts_for_nothing(
    client: Client, body: bytes, status: int, field: str
) -> None:
    size = client.cache_stats()["l1"]["size"]
    reply = client.send("POST", "/embed", content=body)
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"].startswith("application/json")
    told = reply.json()
    assert told["field"] == field
    assert told["error"].startswith(f"{field}: ")
    assert told["request_id"] == reply.headers["x-request-id"]
    assert client.cache_stats()["l1"]["size"] <= size + 1  # "must not be cut" is known only once it is computed
    assert client.embed(["a neighbour"]).status_code == 200


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/embed", 405), ("POST", "/none-such", 404)])
def test_a_wrong_method_or_path_is_refused_in_json(client: Client, method: str, path: str, status: int) -> None:
    reply = client.send(method, path)
    assert reply.status_code == status
    assert reply.json()["error"]


def test_a_body_that_never_arrives_harms_nobody(stack: LocalStack, client: Client) -> None:
    with socket.create_connection(("127.0.0.1", stack.ports.gateway)) as slow:
        slow.sendall(b'POST /embed HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"texts":')
        assert client.embed(fresh_texts(1)).status_code == 200
    assert client.embed(fresh_texts(1)).status_code == 200
