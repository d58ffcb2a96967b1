"""The table of routes, and what is derived from it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

from embedding_service.api import routes
from embedding_service.api.auth import Access
from embedding_service.api.dialects import native, openai, tei

if TYPE_CHECKING:
    from tests.support.gateway_client import Client


async def test_the_wrong_method_and_the_wrong_path_are_told_in_json(client: Client) -> None:
    method, path = await client.http.get("/embed"), await client.http.get("/nowhere")
    assert (method.status_code, method.json()["limit"], method.headers["allow"]) == (405, "POST", "POST")
    assert (path.status_code, path.json()["value"]) == (404, "/nowhere")


async def test_paths_of_strangers_make_no_series(client: Client) -> None:
    for number in range(5):
        await client.http.get(f"/random/{number}")
    assert "/random" not in (await client.http.get("/metrics")).text


@pytest.mark.parametrize("path", ["/health/", "/info/", "/meta/", "/ping/", "/v1/models/", "/v1/models/model/"])
async def test_a_slash_at_the_end_makes_no_difference(client: Client, path: str) -> None:
    client.gateway.catalog.reachable = True
    assert (await client.http.get(path)).status_code == 200


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("embed", "texts"),
        ("embed", "inputs"),
        ("", "inputs"),
        ("embeddings", "input"),
        ("v1/embeddings", "input"),
        ("tokenize", "inputs"),
        ("vectors", "text"),
    ],
)
async def test_nor_does_one_after_a_path_that_takes_texts(client: Client, path: str, field: str) -> None:
    body = {field: "a" if field == "text" else ["a"]}
    for url in (f"/{path}", f"/{path}/"):
        assert (await client.http.post(url, json=body)).status_code == 200


def test_each_method_of_a_path_has_one_row() -> None:
    rows = Counter((path, route.method) for route in routes.ROUTES for path in route.paths)
    assert set(rows.values()) == {1}


def test_each_row_has_one_answer_and_the_framework_has_one_row_of_its_own() -> None:
    answers = {
        route.paths[0]: [bool(route.dialects), route.handler is not None, route.operation is not None].count(True)
        for route in routes.ROUTES
    }
    assert {path for path, count in answers.items() if count != 1} == {"/openapi.json"}


def test_a_row_refuses_in_its_first_dialect() -> None:
    for route in routes.ROUTES:
        if route.dialects:
            assert route.refusals == route.dialects[0].refusals


def test_the_paths_that_share_a_label_are_counted_together() -> None:
    assert routes.metric_labels() == {
        "/embed": "/embed",
        "/": "/embed",
        "/v1/embeddings": "/v1/embeddings",
        "/embeddings": "/v1/embeddings",
        "/vectors": "/vectors",
    }


def test_what_is_open_can_only_be_read() -> None:
    readable = {path for route in routes.ROUTES if route.method == "GET" for path in route.paths}
    assert routes.open_paths(operator_paths_open=False) == {"/livez"}
    assert routes.open_paths(operator_paths_open=True) <= readable
    assert routes.admin_paths() == ("/cache/clear",)
    assert all(route.method == "GET" for route in routes.ROUTES if route.access in {Access.ALWAYS, Access.OPERATOR})


@pytest.mark.parametrize(
    ("path", "dialect"),
    [
        ("/embed", native),
        ("/embeddings", openai),
        ("/v1", openai),
        ("/v1/none", openai),
        ("/v1/models/some/where", openai),
        ("/tokenize", tei),
        ("/tokenize/x", native),
        ("/cache/none", native),
        ("/none", native),
        ("//v1/none", native),
        ("*", native),
        ("", native),
    ],
)
def test_a_path_without_a_row_is_refused_as_the_others_of_its_folder(path: str, dialect: object) -> None:
    assert routes.refusals_of({"path": path, "state": {}}) is dialect.REFUSALS.error_body  # type: ignore[attr-defined]
