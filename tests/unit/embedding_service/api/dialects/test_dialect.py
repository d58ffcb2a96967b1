"""How a path that several dialects share tells them apart, and what they share."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.support.gateway_client import Client


async def test_one_text_is_one_entry_in_every_dialect(client: Client) -> None:
    replies = [
        await client.embed("hello world"),
        await client.tei("hello world"),
        await client.openai("hello world"),
        await client.openai([15339, 1917]),
        await client.tei(["hello world"], "/"),
        await client.http.post("/vectors", json={"text": "hello world"}),
    ]
    assert [reply.headers["x-cache"] for reply in replies] == ["hit=0;miss=1"] + ["hit=1;miss=0"] * 5
    assert len({reply.headers["x-tokens"] for reply in replies}) == 1
    assert client.computed == ["hello world"]


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        ({"texts": ["a"]}, dict),
        ({"texts": ["inputs", 'an "input"', "input"]}, dict),
        ({"texts": ["a"], "inputs": None}, dict),
        ({"inputs": ["texts"]}, list),
        ({"inputs": "a", "texts": None}, list),
    ],
)
async def test_the_body_tells_whose_request_it_is(client: Client, body: Any, shape: type) -> None:
    reply = await client.http.post("/embed", json=body)
    assert (reply.status_code, type(reply.json())) == (200, shape)


@pytest.mark.parametrize(("field", "shape"), [("inputs", list), ("input", dict), ("texts", dict)])
async def test_what_python_writes_for_no_number_does_not_hide_whose_request_it_is(
    client: Client, field: str, shape: type
) -> None:
    reply = await client.http.post("/embed", content=json.dumps({field: ["a"], "score": math.nan, "x": {"input": 1}}))
    assert (reply.status_code, type(reply.json())) == (200, shape)


@pytest.mark.parametrize("second", ["inputs", "input"])
async def test_two_dialects_at_once_are_refused(client: Client, second: str) -> None:
    reply = await client.http.post("/embed", json={"texts": ["a"], second: "a"})
    assert (reply.status_code, reply.json()["value"]) == (400, f"texts and {second}")
    assert client.computed == []
