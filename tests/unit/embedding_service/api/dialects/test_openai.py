"""OpenAI's dialect on the wire, between fake replicas and a fake Redis."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from embedding_common.contract import ModelCard
from embedding_service.api.dialects import cl100k, openai
from embedding_service.errors import Problem
from tests.support.gateway import CARD, model

if TYPE_CHECKING:
    from tests.support.gateway_client import Client

HELLO_WORLD = [15339, 1917]  # cl100k_base


def unit(text: str, dimensions: int = 4) -> Any:
    vector = model(text, CARD)[:dimensions]
    return vector / np.linalg.norm(vector)


async def test_a_reply_has_what_the_specification_has(client: Client) -> None:
    body = (await client.openai(["a", "b c"], model="model", user="me")).json()
    assert list(body) == ["object", "data", "model", "usage"]
    assert (body["object"], body["model"]) == ("list", "model")
    assert [(item["object"], item["index"]) for item in body["data"]] == [("embedding", 0), ("embedding", 1)]
    assert body["usage"] == {"prompt_tokens": 3 + 4, "total_tokens": 3 + 4}
    np.testing.assert_allclose([item["embedding"] for item in body["data"]], [unit("a"), unit("b c")], rtol=1e-6)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embeddings", "/v1/embeddings/", "/embed", "/"])
async def test_one_text_is_a_list_of_one_on_every_path(client: Client, path: str) -> None:
    body = (await client.openai("a", path)).json()
    np.testing.assert_allclose([item["embedding"] for item in body["data"]], [unit("a")], rtol=1e-6)


async def test_usage_is_the_same_for_a_hit_as_for_a_miss(client: Client) -> None:
    computed, cached = [(await client.openai(["a b", "word " * 40])).json() for _ in range(2)]
    assert computed == cached
    assert computed["usage"]["total_tokens"] == 4 + CARD.max_tokens
    assert client.computed == ["a b", "word " * 40]


async def test_base64_is_little_endian_float32_and_only_sent_when_asked_for(client: Client) -> None:
    plain = (await client.openai("a", encoding_format=None)).json()["data"][0]["embedding"]
    packed = (await client.openai("a", encoding_format="base64")).json()["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(packed, validate=True), "<f4"), plain, rtol=1e-6)


async def test_a_large_request_keeps_its_order_over_all_chunks(client: Client) -> None:
    texts = [f"t{n}" for n in range(200)]
    data = (await client.openai(texts)).json()["data"]
    assert [item["index"] for item in data] == list(range(200))
    np.testing.assert_allclose([item["embedding"] for item in data], [unit(text) for text in texts], rtol=1e-6)


async def test_fewer_dimensions_are_cut_and_normalised_anew(client: Client) -> None:
    shorter = (await client.openai("a", dimensions=2)).json()["data"][0]["embedding"]
    np.testing.assert_allclose(shorter, unit("a", 2), rtol=1e-6)
    assert (await client.openai("a", dimensions=4)).status_code == 200


async def test_null_means_absent_and_unknown_fields_are_ignored(client: Client) -> None:
    nothing: dict[str, Any] = dict.fromkeys(
        ["model", "encoding_format", "dimensions", "user", "prompt_name", "input_type"]
    )
    assert (await client.openai("a", **nothing, prefix="query: ")).status_code == 200


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded"])
async def test_the_content_type_does_not_matter(client: Client, content_type: str) -> None:
    reply = await client.http.post("/v1/embeddings", content=b'{"input":"a"}', headers={"content-type": content_type})
    assert reply.status_code == 200


async def test_an_empty_string_is_a_text(client: Client) -> None:
    assert len((await client.openai([""])).json()["data"]) == 1


@pytest.mark.parametrize(("given", "param"), [("", "input[0]"), (["a", "", ""], "input[1]")])
async def test_in_strict_mode_an_empty_string_is_refused_as_the_specification_has_it(
    strict: Client, given: Any, param: str
) -> None:
    reply = await strict.openai(given)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert "an empty string" in reply.json()["error"]["message"]
    assert (await strict.openai(["a", " "])).status_code == 200
    assert (await strict.embed("")).status_code == 200  # the native dialect's texts may be empty


@pytest.mark.parametrize(
    ("ids", "texts"),
    [
        (HELLO_WORLD, ["hello world"]),
        ([HELLO_WORLD, [65]], ["hello world", "b"]),
        ([100257], ["<|endoftext|>"]),
        ([9468], ["\ufffd"]),  # the first half of a character, as a client may cut it
    ],
)
async def test_token_ids_are_embedded_as_the_text_they_stand_for(client: Client, ids: Any, texts: list[str]) -> None:
    assert (await client.openai(ids)).status_code == 200
    assert client.computed == texts


async def test_token_ids_and_their_text_share_one_entry(client: Client) -> None:
    await client.openai("hello world")
    assert (await client.openai([HELLO_WORLD])).headers["x-cache"] == "hit=1;miss=0"


async def test_without_the_table_of_tokens_a_refusal_says_what_to_do(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cl100k, "table", lambda: None)
    reply = await client.openai([HELLO_WORLD])
    assert reply.status_code == 400
    assert "check_embedding_ctx_length=False" in reply.json()["error"]["message"]


# body, status, param, code, words of the message
BAD: dict[str, tuple[Any, int, str, str | None, str]] = {
    "no input": ({"model": "model"}, 400, "input", None, "got nothing"),
    "null": ({"input": None}, 400, "input", None, "got null"),
    "a number": ({"input": 7}, 400, "input", None, "got 7"),
    "an object": ({"input": {}}, 400, "input", None, "got an object"),
    "empty list": ({"input": []}, 400, "input", None, "at least one text"),
    "no token": ({"input": [[]]}, 400, "input[0]", None, "at least one token id"),
    "mixed": ({"input": ["a", 7]}, 400, "input[1]", None, "got 7"),
    "mixed the other way": ({"input": [7, "a"]}, 400, "input[1]", None, "got 'a'"),
    "true is no token": ({"input": [[True]]}, 400, "input[0][0]", None, "got true"),
    "too many": ({"input": ["a"] * 201}, 400, "input", None, "at most 200 texts, got 201"),
    "too many token lists": ({"input": [[1]] * 201}, 400, "input", None, "at most 200 texts, got 201"),
    "too long": ({"input": ["a", "b" * 401]}, 400, "input[1]", None, "at most 400 bytes, got 401"),
    "no such token": ({"input": [[65], [100256]]}, 400, "input[1]", None, "100256 is no token id"),
    "token ids without end": ({"input": [65] * 401}, 400, "input", None, "at most 400 token ids, got 401"),
    "one such list": ({"input": [[65], [65] * 401]}, 400, "input[1]", None, "at most 400 token ids, got 401"),
    "negative token": ({"input": [-1]}, 400, "input", None, "-1 is no token id"),
    "dimensions": ({"input": "a", "dimensions": 1536}, 400, "dimensions", None, "model has 4, got 1536"),
    "dimensions 0": ({"input": "a", "dimensions": 0}, 400, "dimensions", None, "got 0"),
    "format": ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format", None, "'float' or 'base64'"),
    "model": ({"input": "a", "model": "none-such"}, 404, "model", "model_not_found", "available: model"),
    "model of a wrong type": ({"input": "a", "model": 7}, 400, "model", None, "got 7"),
    "prompt": ({"input": "a", "prompt_name": "x"}, 400, "prompt_name", None, "has the prompts: query"),
    "too long to take": ({"input": "word " * 40, "truncate": False}, 400, "input[0]", None, "42 tokens, at most 16"),
    "not an object": ([], 400, "body", None, "a list of 0"),
}


@pytest.mark.parametrize("case", BAD)
async def test_a_refusal_is_an_error_object_that_names_the_param(client: Client, case: str) -> None:
    body, status, param, code, words = BAD[case]
    reply = await client.http.post("/v1/embeddings", json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (status, param, code)
    assert list(error) == ["message", "type", "param", "code"]
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b'{"input": "\xff"}', b'{"input": "\\ud800"}', b"[" * 9999])
async def test_what_is_no_json_is_a_400(client: Client, body: bytes) -> None:
    reply = await client.http.post("/v1/embeddings", content=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "body")


async def test_too_long_a_body_is_a_413(client: Client) -> None:
    reply = await client.http.post("/v1/embeddings", content=b"x" * 20_001)
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")


async def test_who_must_wait_is_told_how_long(client: Client) -> None:
    client.gateway.catalog._default = None
    client.gateway.catalog._named.clear()
    reply = await client.openai("a")
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "2")
    assert reply.json()["error"]["type"] == "server_error"


async def test_a_bug_is_a_500_that_clients_do_not_repeat(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.gateway.catalog, "card", lambda model_id: 1 / 0)
    reply = await client.openai("a")
    assert (reply.status_code, reply.headers["x-should-retry"]) == (500, "false")
    assert "division" not in reply.text


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/embeddings", 405), ("POST", "/v1/none", 404)])
async def test_a_wrong_method_or_path_is_an_error_object_too(
    client: Client, method: str, path: str, status: int
) -> None:
    reply = await client.http.request(method, path)
    assert reply.status_code == status
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


async def test_models_are_listed_by_every_name_they_answer_to(client: Client) -> None:
    listed = (await client.http.get("/v1/models")).json()
    assert [item["id"] for item in listed["data"]] == ["model", "alias", "text-embedding-3-small"]
    assert listed["data"][0] == {"id": "model", "object": "model", "created": 0, "owned_by": "embedding-service"}
    assert (await client.http.get("/v1/models/alias")).json()["id"] == "alias"


async def test_an_unknown_model_is_not_found(client: Client) -> None:
    reply = await client.http.get("/v1/models/some/where")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")


async def test_an_alias_shares_the_entries_of_its_model_which_the_reply_names(client: Client) -> None:
    for name in ("model", "alias", "text-embedding-3-small", None):
        assert (await client.openai("a", model=name)).json()["model"] == "model"
    assert client.computed == ["a"]


async def test_a_model_that_is_not_loaded_answers_once_it_is(client: Client) -> None:
    client.gateway.balancer.others = {"elsewhere": ModelCard("elsewhere", "print-9", 4, 16)}
    await client.gateway.catalog._refresh()
    for _ in range(2):
        reply = await client.openai("a", model="elsewhere", dimensions=4)
        assert reply.json()["model"] == "elsewhere"
    assert client.computed == ["probe", "a"]
    assert [one["state"] for one in (await client.http.get("/models")).json()["models"]] == ["ready", "ready"]


def test_every_problem_has_a_row_in_the_table() -> None:
    assert set(Problem.__subclasses__()) == set(openai.STATUS)
