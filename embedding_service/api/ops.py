"""What operators and probes call: health, readiness, information, statistics, clearing, metrics."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import orjson
from fastapi import APIRouter, Response

from embedding_service.metrics import VERSION, Outcome

if TYPE_CHECKING:
    from embedding_service.config import Settings
    from embedding_service.service import Service


def router(service: Service) -> APIRouter:
    """Routes over the parts of one gateway."""
    ops = APIRouter(tags=["operations"])

    @ops.get("/livez", summary="The process runs; says nothing of Redis or replicas.")
    def livez() -> Response:
        return _json({"status": "alive"})

    @ops.get("/readyz", summary="Ready to answer what is cached: not draining, and a model is known.")
    def readyz() -> Response:
        reasons = service.unready()
        return _json({"status": "unready" if reasons else "ready", "reasons": reasons}, 503 if reasons else 200)

    @ops.get("/health", summary="Healthy: ready, and replicas answer.")
    def health() -> Response:
        reasons = service.unhealthy()
        body = {
            "status": "unhealthy" if reasons else "healthy",
            "model_loaded": service.catalog.current is not None,
            "ml_base_connected": service.catalog.reachable,
            "edition": service.settings.edition,
            "uptime_seconds": round(service.metrics.uptime_s(), 3),
            "total_requests": service.metrics.requests.total,
        }
        return _json(body | {"reasons": reasons} if reasons else body, 503 if reasons else 200)

    @ops.get("/info", summary="Version, model, limits, and the effective configuration without secrets.")
    def info() -> Response:
        return _json(_info(service))

    @ops.get("/models", summary="The models that answer here.")
    def models() -> Response:
        card = service.catalog.current
        return _json(
            {"default": card and card.id, "models": [{"card": asdict(card), "state": "ready"}] if card else []}
        )

    @ops.get("/cache/stats", summary="Hits and misses per text and per tier.")
    def cache_stats() -> Response:
        return _json(cache_figures(service))

    @ops.post("/cache/clear", summary="Forget every cached vector, in every gateway and in Redis.")
    async def cache_clear() -> Response:
        service.metrics.publish()
        l1 = service.l1_figures["size"].total  # of all processes: the others clear before their next look-up
        l2 = await service.fill.clear()
        note = {} if l2 is not None or not service.store.enabled else {"note": "Redis is away; cleared when it is back"}
        return _json({"status": "cleared", "l1_cleared": l1, "l2_cleared": l2, **note})

    @ops.get("/metrics", summary="Prometheus.")
    def metrics() -> Response:
        return Response(service.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return ops


def cache_figures(service: Service) -> dict[str, dict[str, Any]]:
    """Per text: l1.hits + l2.hits + joined + misses = requests; texts that failed count as misses."""
    metrics = service.metrics
    metrics.publish()
    l1 = {name: figure.total for name, figure in service.l1_figures.items()}
    count = metrics.totals()
    requests = sum(count.values())
    hits = requests - count[Outcome.UPSTREAM] - count[Outcome.FAILED]
    looked_up = {result: figure.total for result, figure in metrics.l2_lookups.items()}
    return {
        "l1": {
            "size": l1["size"],
            "max_size": l1["max_size"],
            "bytes": l1["bytes"],
            "hits": count[Outcome.L1],
            "misses": requests - count[Outcome.L1],
            "hit_rate": _rate(count[Outcome.L1], requests),
            "evictions": l1["evictions"],
            "expired": l1["expired"],
        },
        "l2": {
            "hits": count[Outcome.L2],
            "misses": looked_up["miss"],
            "hit_rate": _rate(looked_up["hit"], looked_up["hit"] + looked_up["miss"]),
            "errors": sum(figure.total for figure in metrics.l2_errors.values()),
            "enabled": service.store.enabled,
            "connected": service.store.connected,
        },
        "total": {
            "requests": requests,
            "hits": hits,
            "misses": requests - hits,
            "joined": count[Outcome.JOINED],
            "failed": count[Outcome.FAILED],
            "hit_rate": _rate(hits, requests),
        },
    }


def _info(service: Service) -> dict[str, Any]:
    settings: Settings = service.settings
    card = service.catalog.current
    return {
        "service": "embedding-service",
        "version": VERSION,
        "edition": settings.edition,
        "model": card and card.id,
        "dimension": card and card.dimension,
        "fingerprint": card and card.fingerprint,
        "limits": {
            "max_texts": settings.max_texts,
            "max_text_bytes": settings.max_text_bytes,
            "max_body_bytes": settings.max_body_bytes,
            "max_tokens": card and card.max_tokens,
        },
        "available_models": [card.id] if card else [],
        "configuration": settings.public(),
    }


def _rate(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0


def _json(body: object, status: int = 200) -> Response:
    return Response(orjson.dumps(body), status_code=status, media_type="application/json")
