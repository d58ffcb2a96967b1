"""Requests that embed, on the wire: the whole application in process, between fake replicas and a fake Redis."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from embedding_service.api import serving
from tests.support.gateway import CARD, model, settle
from tests.support.gateway_client import SETTINGS, Client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


def unit(vector: Any) -> Any:
    return vector / np.linalg.norm(vector)


async def test_a_reply_has_the_fields_of_the_contract(client: Client) -> None:
    await client.embed("a")
    body = (await client.embed("a", "b")).json()
    assert list(body) == [
        "embeddings", "dimension", "model", "processing_time_ms", "cached_count", "edition", "batch_size",
    ]  # fmt: skip
    assert (body["dimension"], body["model"], body["cached_count"]) == (4, "model", 1)
    assert (body["edition"], body["batch_size"]) == ("simple", 2)
    np.testing.assert_allclose(body["embeddings"], [unit(model(text, CARD)) for text in "ab"], rtol=1e-6)


async def test_normalize_false_gives_the_models_own_output(client: Client) -> None:
    body = (await client.embed("a", normalize=False)).json()
    np.testing.assert_array_equal(body["embeddings"], [model("a", CARD)])


async def test_one_entry_serves_every_variant(client: Client) -> None:
    for variant in ({}, {"normalize": False}, {"dimensions": 2}, {"dimensions": 2, "normalize": False}):
        body = (await client.embed("a", **variant)).json()
        expected = model("a", CARD)[: variant.get("dimensions", 4)]
        expected = expected if variant.get("normalize") is False else unit(expected)
        np.testing.assert_allclose(body["embeddings"], [expected], rtol=1e-6)
    assert len(client.gateway.balancer.sent) == 1


async def test_null_means_absent_and_unknown_fields_are_ignored(client: Client) -> None:
    nothing = dict.fromkeys(["normalize", "model_id", "cache_ttl_seconds", "dimensions", "prompt_name", "truncate"])
    assert (await client.embed("a", **nothing, prefix="query")).status_code == 200


async def test_the_content_type_does_not_matter(client: Client) -> None:
    reply = await client.http.post("/embed", content=b'{"texts": ["a"]}', headers={"content-type": "text/plain"})
    assert reply.status_code == 200


async def test_an_empty_text_is_a_text(client: Client) -> None:
    assert (await client.embed("")).json()["batch_size"] == 1


async def test_a_large_reply_is_put_together_right(client: Client) -> None:
    texts = [f"text {n}" for n in range(300)]
    body = (await client.embed(*texts)).json()
    np.testing.assert_allclose(body["embeddings"], [unit(model(text, CARD)) for text in texts], rtol=1e-6)


async def test_truncate_false_refuses_what_would_be_cut(client: Client) -> None:
    long = "word " * 40
    assert (await client.embed(long)).status_code == 200
    reply = await client.embed("short", long, truncate=False)
    assert reply.status_code == 422
    assert reply.json()["error"] == "texts[1]: 42 tokens, at most 16 with truncate=false"
    assert (await client.embed("short", truncate=False)).status_code == 200


async def test_cache_control_no_cache_computes_anew(client: Client) -> None:
    for _ in range(2):
        await client.http.post("/embed", json={"texts": ["a"]}, headers={"cache-control": "no-cache"})
    assert len(client.gateway.balancer.sent) == 2


BAD = {
    "empty list": ({"texts": []}, 422, "texts", "a list of 0"),
    "not a list": ({"texts": "a"}, 422, "texts", "'a'"),
    "missing": ({}, 422, "texts", "nothing"),
    "not strings": ({"texts": ["a", 7]}, 422, "texts[1]", "7"),
    "null text": ({"texts": [None]}, 422, "texts[0]", "null"),
    "too many": ({"texts": ["a"] * 301}, 422, "texts", 301),
    "too long a text": ({"texts": ["a", "é" * 201]}, 422, "texts[1]", 402),
    "unknown model": ({"texts": ["a"], "model_id": "other"}, 404, "model_id", "other"),
    "negative ttl": ({"texts": ["a"], "cache_ttl_seconds": -1}, 422, "cache_ttl_seconds", "-1"),
    "ttl of a wrong type": ({"texts": ["a"], "cache_ttl_seconds": "1"}, 422, "cache_ttl_seconds", "'1'"),
    "dimensions 0": ({"texts": ["a"], "dimensions": 0}, 422, "dimensions", "0"),
    "too many dimensions": ({"texts": ["a"], "dimensions": 5}, 422, "dimensions", 5),
    "normalize of a wrong type": ({"texts": ["a"], "normalize": "yes"}, 422, "normalize", "'yes'"),
    "unknown prompt": ({"texts": ["a"], "prompt_name": "x"}, 422, "prompt_name", "x"),
    "unknown direction": ({"texts": ["a"], "truncation_direction": "up"}, 422, "truncation_direction", "'up'"),
    "not an object": ([], 422, "body", "a list of 0"),
}


@pytest.mark.parametrize("case", BAD)
async def test_a_bad_request_is_told_field_and_value_and_nothing_is_computed(client: Client, case: str) -> None:
    body, status, field, value = BAD[case]
    reply = await client.http.post("/embed", json=body)
    told = reply.json()
    assert (reply.status_code, told["field"], told["value"]) == (status, field, value)
    assert field in told["error"]
    assert told["request_id"] == reply.headers["x-request-id"]
    assert client.gateway.balancer.sent == []


@pytest.mark.parametrize(
    "body", [b"", b"{", b'{"texts": ["\xff"]}', b'{"texts": ["\\ud800"]}', b'{"texts": ["\xed\xa0\x80"]}', b"[" * 9999]
)
async def test_what_is_no_json_is_a_400(client: Client, body: bytes) -> None:
    reply = await client.http.post("/embed", content=body)
    assert (reply.status_code, reply.json()["field"]) == (400, "body")


async def test_large_bodies_at_once_are_refused_past_their_room_and_small_ones_never(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serving, "LARGE_BODY_BYTES", 10_000)
    monkeypatch.setattr("embedding_service.app.LARGE_BODIES_BYTES", 30_000)
    client = Client(SETTINGS.model_copy(update={"max_body_bytes": 15_000, "workers": 2}))
    end, large = asyncio.Event(), b'{"texts": ["a"]}'.ljust(10_001)

    async def slowly() -> AsyncIterator[bytes]:
        yield large
        await end.wait()

    held = asyncio.create_task(client.http.post("/embed", content=slowly()))
    await settle()
    statuses = [(await client.http.post("/embed", content=body)).status_code for body in (large, b'{"texts": ["a"]}')]
    end.set()
    statuses += [(await held).status_code, (await client.http.post("/embed", content=large)).status_code]
    assert statuses == [429, 200, 200, 200]
    await client.close()


async def test_too_long_a_body_is_a_413_that_names_the_limit(client: Client) -> None:
    reply = await client.http.post("/embed", content=b"x" * 20_001)
    assert reply.status_code == 413
    assert (reply.json()["limit"], reply.json()["value"]) == (20_000, 20_001)


async def test_a_body_without_a_length_is_cut_off_at_the_limit(client: Client) -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 5000

    reply = await client.http.post("/embed", content=endless())
    assert (reply.status_code, reply.json()["field"]) == (413, "body")


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("x-priority", "urgent"),
        ("x-request-timeout-ms", "soon"),
        ("x-request-timeout-ms", "-5"),
        ("x-request-timeout-ms", "nan"),
    ],
)
async def test_a_bad_header_is_named(client: Client, header: str, value: str) -> None:
    reply = await client.http.post("/embed", json={"texts": ["a"]}, headers={header: value})
    assert (reply.status_code, reply.json()["field"], reply.json()["value"]) == (422, header, value)


async def test_a_bad_request_harms_no_neighbour(client: Client) -> None:
    good, bad = await asyncio.gather(client.embed("a"), client.embed("a", dimensions=99))
    assert (good.status_code, bad.status_code) == (200, 422)


async def test_a_given_request_id_comes_back_and_a_bad_one_is_replaced(client: Client) -> None:
    given = await client.http.get("/livez", headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    bad = await client.http.get("/livez", headers={"x-request-id": "x" * 200})
    assert len(bad.headers["x-request-id"]) == 16


async def test_the_request_id_and_the_deadline_travel_upstream(client: Client) -> None:
    headers = {"x-request-id": "mine-1", "x-request-timeout-ms": "5000"}
    await client.http.post("/embed", json={"texts": ["a"]}, headers=headers)
    sent = client.gateway.balancer.sent[0].headers
    assert sent["x-request-id"] == "mine-1"
    assert 4000 < int(sent["x-request-timeout-ms"]) <= 5000


@pytest.mark.parametrize(("texts", "lane"), [(1, "interactive"), (4, "interactive"), (5, "bulk")])
async def test_few_texts_mean_a_person(client: Client, texts: int, lane: str) -> None:
    await client.embed(*(str(n) for n in range(texts)))
    assert client.gateway.balancer.sent[0].headers["x-priority"] == lane


async def test_the_priority_header_decides_the_lane(client: Client) -> None:
    await client.http.post("/embed", json={"texts": ["a"]}, headers={"x-priority": "bulk"})
    assert client.gateway.balancer.sent[0].headers["x-priority"] == "bulk"


async def test_a_full_lane_is_a_429_that_says_when(client: Client) -> None:
    client.gateway.balancer.answers_at_once = False
    first = asyncio.create_task(client.embed(*(f"{n}" * 33 for n in range(100, 200))))
    await settle()
    reply = await client.embed(*(f"{n}" * 33 for n in range(200, 300)))
    assert reply.status_code == 429
    assert reply.headers["retry-after"] == "1"
    assert reply.json()["error_type"] == "Overloaded"
    first.cancel()


async def test_no_model_known_is_a_503_that_says_when(client: Client) -> None:
    client.gateway.catalog._default = None
    client.gateway.catalog._named.clear()
    reply = await client.embed("a")
    assert (reply.status_code, reply.headers["retry-after"], reply.json()["error_type"]) == (503, "2", "Unhealthy")


async def test_an_unexpected_error_is_a_500_without_detail(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.gateway.catalog, "card", lambda model_id: 1 / 0)
    reply = await client.embed("a")
    assert reply.status_code == 500
    assert "division" not in reply.text


async def test_every_reply_says_what_it_cost(client: Client) -> None:
    await client.embed("a")
    headers = (await client.embed("a", "b c", "word " * 40)).headers
    assert (headers["x-cache"], headers["x-tokens"], headers["x-truncated"]) == ("hit=1;miss=2", str(3 + 4 + 16), "1")
    assert [stage.partition(";")[0] for stage in headers["server-timing"].split(", ")] == ["receive", "embed", "encode"]


async def test_texts_that_were_cut_are_counted_each_time_they_are_answered(client: Client) -> None:
    for _ in range(2):
        assert (await client.openai(["short", "word " * 40])).status_code == 200
    assert "embedding_truncated_texts_total 2.0" in (await client.http.get("/metrics")).text


async def test_the_lifetime_may_come_in_a_header(client: Client) -> None:
    for _ in range(2):
        await client.http.post("/embed", json={"texts": ["a"]}, headers={"x-cache-ttl": "0"})
    assert client.computed == ["a", "a"]
    wrong = await client.http.post("/embed", json={"texts": ["a"]}, headers={"x-cache-ttl": "soon"})
    assert (wrong.status_code, wrong.json()["field"]) == (422, "x-cache-ttl")


@pytest.mark.parametrize("authorization", [None, "", "Bearer ", "Bearer fake", "Basic eDp5", "nonsense"])
async def test_any_authorization_is_accepted_while_no_keys_are_set(client: Client, authorization: str | None) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    assert (await client.http.post("/v1/embeddings", json={"input": "a"}, headers=headers)).status_code == 200


async def test_the_kind_of_input_takes_the_models_prompt_for_it(client: Client) -> None:
    for dialect in (client.embed, client.openai, client.tei):
        assert (await dialect("a", input_type="query")).status_code == 200
    assert [call.body["prompt_name"] for call in client.gateway.balancer.sent] == ["query"]
    await client.embed("a", input_type="document")  # for which the model has no prompt
    assert client.gateway.balancer.sent[-1].body["prompt_name"] is None


async def test_a_named_prompt_goes_before_the_kind_of_input(client: Client) -> None:
    await client.embed("a", input_type="document", prompt_name="query")
    assert client.gateway.balancer.sent[0].body["prompt_name"] == "query"


async def test_truncation_may_be_something_to_be_asked_for() -> None:
    client = Client(SETTINGS.model_copy(update={"auto_truncate": False}))
    assert (await client.embed("word " * 40)).status_code == 422
    assert (await client.embed("word " * 40, truncate=True)).status_code == 200
    await client.close()
