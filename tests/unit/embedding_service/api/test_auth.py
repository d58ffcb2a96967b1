"""Who may ask what, through the whole application."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from embedding_service.api import routes
from tests.support.gateway_client import SETTINGS, Client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx

KEY, OTHER_KEY, ADMIN_KEY = "key-one", "key-two", "key-admin"
LOCKED = {"api_keys": f"{KEY},{OTHER_KEY}", "admin_api_keys": ADMIN_KEY}


def caller(**settings: object) -> Client:
    return Client(type(SETTINGS).model_validate(SETTINGS.model_dump() | settings))


@pytest.fixture
async def locked() -> AsyncIterator[Client]:
    client = caller(**LOCKED)
    yield client
    await client.close()


async def ask(client: Client, method: str, path: str, key: str | None = None) -> httpx.Response:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return await client.http.request(method, path, json={"texts": ["a"]}, headers=headers)


@pytest.mark.parametrize("key", [KEY, OTHER_KEY, ADMIN_KEY])
async def test_each_key_opens_the_door(locked: Client, key: str) -> None:
    assert (await ask(locked, "POST", "/embed", key)).status_code == 200


@pytest.mark.parametrize("key", [None, "", "key-on", "key-one,key-two", "key-one x"])
async def test_no_key_or_a_wrong_one_is_a_401_that_costs_nothing(locked: Client, key: str | None) -> None:
    reply = await ask(locked, "POST", "/embed", key)
    assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
    assert reply.json()["error_type"] == "Unauthorized"
    assert reply.json()["field"] == "authorization"
    assert not locked.gateway.balancer.sent


async def test_openais_dialect_is_refused_in_its_own_words(locked: Client) -> None:
    reply = await ask(locked, "POST", "/v1/embeddings")
    assert (reply.status_code, reply.json()["error"]["type"]) == (401, "authentication_error")


@pytest.mark.parametrize(
    "path", ["/info", "/models", "/v1/models", "/cache/stats", "/nowhere", "/health%0a", "/livez/x"]
)
async def test_whatever_is_not_known_to_be_open_is_closed(locked: Client, path: str) -> None:
    assert (await ask(locked, "GET", path)).status_code == 401


@pytest.mark.parametrize("path", ["/health", "/livez", "/livez/", "/readyz", "/metrics", "/docs", "/openapi.json"])
async def test_operators_and_probes_need_no_key(locked: Client, path: str) -> None:
    assert (await ask(locked, "GET", path)).status_code in {200, 503}


@pytest.mark.parametrize("path", sorted(routes.open_paths(operator_paths_open=True)))
async def test_what_is_said_to_be_open_is_there(client: Client, path: str) -> None:
    assert (await ask(client, "GET", path)).status_code in {200, 204, 503}


async def test_operators_can_be_locked_out_too_but_the_container_engine_cannot() -> None:
    client = caller(**LOCKED, operator_paths_open=False)
    for path in ("/health", "/readyz", "/metrics", "/docs"):
        assert (await ask(client, "GET", path)).status_code == 401
    assert (await ask(client, "GET", "/metrics", KEY)).status_code == 200
    assert (await ask(client, "GET", "/livez")).status_code == 200
    await client.close()


@pytest.mark.parametrize("path", ["/cache/clear", "/cache/clear/", "/cache/clear%0a"])
async def test_only_an_admin_key_clears_the_cache(locked: Client, path: str) -> None:
    assert (await ask(locked, "POST", path)).status_code == 401
    refused = await ask(locked, "POST", path, KEY)
    assert (refused.status_code, refused.json()["error_type"]) == (403, "Forbidden")
    assert (await ask(locked, "POST", path, ADMIN_KEY)).status_code == 200


async def test_admin_keys_alone_lock_nothing_else() -> None:
    client = caller(admin_api_keys=ADMIN_KEY)
    assert (await ask(client, "POST", "/embed", "any")).status_code == 200
    assert (await ask(client, "POST", "/cache/clear", "any")).status_code == 401
    await client.close()


async def test_without_admin_keys_an_api_key_clears_the_cache_if_there_are_any() -> None:
    client, open_to_all = caller(api_keys=KEY), caller()
    assert (await ask(client, "POST", "/cache/clear")).status_code == 401
    assert (await ask(client, "POST", "/cache/clear", KEY)).status_code == 200
    assert (await ask(open_to_all, "POST", "/cache/clear")).status_code == 200
    await client.close()
    await open_to_all.close()


async def test_no_key_is_ever_shown(locked: Client) -> None:
    info = await ask(locked, "GET", "/info", KEY)
    assert info.status_code == 200
    shown = info.text + repr(locked.service.settings) + repr(vars(locked.service))
    assert not [key for key in (KEY, OTHER_KEY, ADMIN_KEY) if key in shown]


async def test_a_refusal_is_counted_and_carries_its_request_id(locked: Client) -> None:
    reply = await ask(locked, "POST", "/embed")
    assert reply.json()["request_id"] == reply.headers["x-request-id"]
    text = (await locked.http.get("/metrics")).text
    assert 'embedding_requests_total{route="/embed",status="401"} 1.0' in text
