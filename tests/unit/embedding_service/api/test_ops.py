"""What operators and probes are told, through the whole application in process."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.support.gateway_client import Client


async def test_statistics_add_up_per_text(client: Client) -> None:
    await client.embed("a", "a", "b")
    client.gateway.l1.clear()
    await client.embed("a", "c")
    await client.embed("a")
    stats = (await client.http.get("/cache/stats")).json()
    assert set(stats["l1"]) == {"size", "max_size", "bytes", "hits", "misses", "hit_rate", "evictions", "expired"}
    assert set(stats["l2"]) == {"hits", "misses", "hit_rate", "errors", "enabled", "connected"}
    assert stats["total"] == {"requests": 6, "hits": 3, "misses": 3, "joined": 1, "failed": 0, "hit_rate": 0.5}
    assert (stats["l1"]["hits"], stats["l2"]["hits"]) == (1, 1)


async def test_clearing_says_how_many_and_empties_both_tiers(client: Client) -> None:
    await client.embed("a", "b")
    assert (await client.http.post("/cache/clear")).json() == {"status": "cleared", "l1_cleared": 2, "l2_cleared": 2}
    assert (await client.embed("a")).json()["cached_count"] == 0


async def test_health_names_its_reasons(client: Client) -> None:
    client.gateway.catalog.reachable = True
    healthy = await client.http.get("/health")
    assert healthy.status_code == 200
    assert set(healthy.json()) == {
        "status", "model_loaded", "ml_base_connected", "edition", "uptime_seconds", "total_requests",
    }  # fmt: skip
    client.gateway.catalog.lost()
    unhealthy = await client.http.get("/health")
    assert (unhealthy.status_code, unhealthy.json()["status"]) == (503, "unhealthy")
    assert "no replica answers" in unhealthy.json()["reasons"][0]


async def test_draining_unreadies_but_goes_on_serving(client: Client) -> None:
    client.service.drain()
    assert (await client.http.get("/readyz")).status_code == 503
    assert (await client.http.get("/livez")).status_code == 200
    reply = await client.embed("a")
    assert (reply.status_code, reply.headers["connection"]) == (200, "close")


async def test_information_hides_secrets(client: Client) -> None:
    info = await client.http.get("/info")
    assert info.json()["configuration"]["REDIS_PASSWORD"] == "***"
    assert "a secret" not in info.text
    assert info.json()["limits"]["max_texts"] == 300


async def test_every_series_exists_from_the_start(client: Client) -> None:
    text = (await client.http.get("/metrics")).text
    for series in (
        'texts_total{outcome="joined"} 0.0',
        'requests_total{route="/embed",status="429"} 0.0',
        "l1_bytes 0.0",
    ):
        assert f"embedding_{series}" in text
