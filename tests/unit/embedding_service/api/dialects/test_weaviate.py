"""Weaviate's dialect on the wire, between fake replicas and a fake Redis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.support.gateway_client import Client


async def test_weaviate_sends_no_content_type_and_gets_its_text_back(client: Client) -> None:
    raw = b'{"text":"a","dims":0,"vector":null,"error":"","config":{"pooling_strategy":"","task_type":"query"}}'
    reply = (await client.http.post("/vectors", content=raw)).json()
    assert (reply["text"], reply["dim"], len(reply["vector"])) == ("a", 4, 4)
    assert client.gateway.balancer.sent[0].body["prompt_name"] == "query"


async def test_weaviate_gets_as_many_dimensions_as_its_collection_is_set_to(client: Client) -> None:
    reply = (await client.http.post("/vectors", json={"text": "a", "config": {"dimensions": 3}})).json()
    assert (reply["dim"], len(reply["vector"])) == (3, 3)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"text": 7}, "text"),
        ({}, "text"),
        ({"text": "a", "config": {"dimensions": 0}}, "config.dimensions"),
        ({"text": "a", "config": {"dimensions": 1536}}, "dimensions"),
    ],
)
async def test_weaviate_is_told_what_is_wrong_in_a_string(client: Client, body: Any, field: str) -> None:
    reply = await client.http.post("/vectors", json=body)
    assert (reply.status_code, reply.json()["field"]) == (422, field)
    assert reply.json()["error"].startswith(field)


async def test_weaviate_finds_the_service_ready(client: Client) -> None:
    assert (await client.http.get("/.well-known/ready")).status_code == 204
    assert (await client.http.get("/.well-known/live")).status_code == 204
    assert (await client.http.get("/meta")).json()["model"] == "model"
