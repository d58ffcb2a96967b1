"""The OpenAPI document, and that its examples run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.support.gateway_client import Client


POSTS = ["/", "/embed", "/embeddings", "/tokenize", "/v1/embeddings", "/vectors"]


async def test_the_openapi_document_has_every_route(client: Client) -> None:
    paths = (await client.http.get("/openapi.json")).json()["paths"]
    gets = {"/health", "/livez", "/readyz", "/info", "/models", "/cache/stats", "/metrics", "/v1/models"}
    assert gets | {"/cache/clear", *POSTS} <= set(paths)


def refusals(document: Any, path: str) -> dict[str, Any]:
    """Status -> schema of `error`, of all methods of a path."""
    found = {}
    for operation in document["paths"][path].values():
        for status, response in operation["responses"].items():
            if status >= "400" and "content" in response:
                schema = response["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
                found[status] = document["components"]["schemas"][schema]["properties"]["error"]
    return found


async def test_the_openapi_document_has_the_refusals_of_every_route_in_its_dialects_shape(client: Client) -> None:
    document = (await client.http.get("/openapi.json")).json()
    for path in document["paths"]:
        told = refusals(document, path)
        assert ("401" in told) == (path != "/livez")
        kind = "$ref" if path.startswith("/v1/") or path == "/embeddings" else "type"
        assert not [status for status, error in told.items() if kind not in error]
        if path in POSTS:
            assert {"400", "401", "403", "404", "413", "429", "503", "504"} <= set(told)


@pytest.mark.parametrize("path", POSTS)
async def test_every_example_of_the_openapi_document_runs(client: Client, path: str) -> None:
    document = (await client.http.get("/openapi.json")).json()
    examples = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["examples"]
    assert examples
    for name, example in examples.items():
        reply = await client.http.post(path, json=example["value"])
        assert reply.status_code == 200, (name, reply.text)
