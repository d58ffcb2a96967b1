"""What operators and probes call: health, readiness, information, statistics, clearing, metrics."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import orjson
from fastapi import APIRouter, Response

from embedding_common import native
from embedding_service.api.dialects import openai, tei
from embedding_service.observability.metrics import VERSION, Outcome

if TYPE_CHECKING:
    from embedding_service.config import Settings
    from embedding_service.core.catalog import Catalog
    from embedding_service.service import Service


def router(service: Service) -> APIRouter:
    """Routes over the parts of one gateway."""
    ops = APIRouter(tags=["operations"])

    @ops.get("/livez", summary="The process runs; says nothing of Redis or replicas.")
    def livez() -> Response:
        return _json({"status": "alive"})

    ops.include_router(_lockable(service))
    return ops


def _lockable(service: Service) -> APIRouter:
    """Whatever may need a key."""
    ops = APIRouter(responses={401: {"model": native.ErrorReply}})
    _add_probes(ops, service)
    _add_information(ops, service)
    _add_models(ops, service)

    @ops.get("/cache/stats", summary="Hits and misses per text and per tier.")
    def cache_stats() -> Response:
        return _json(cache_figures(service))

    @ops.post(
        "/cache/clear",
        summary="Forget every cached vector, in every gateway and in Redis.",
        responses={403: {"model": native.ErrorReply}},
    )
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


def _add_probes(ops: APIRouter, service: Service) -> None:
    down: dict[int | str, dict[str, Any]] = {503: {"description": "`reasons` tell why not."}}

    @ops.get("/readyz", summary="Ready to answer what is cached: not draining, and a model is known.", responses=down)
    def readyz() -> Response:
        reasons = service.unready()
        return _json({"status": "unready" if reasons else "ready", "reasons": reasons}, 503 if reasons else 200)

    @ops.get("/.well-known/live", summary="As /livez; Weaviate asks here.", status_code=204)
    def well_known_live() -> Response:
        return Response(status_code=204)

    @ops.get("/.well-known/ready", summary="As /readyz; Weaviate asks here.", status_code=204, responses=down)
    def well_known_ready() -> Response:
        return Response(status_code=503 if service.unready() else 204)

    @ops.get("/", summary="As /health: what a client finds that was given the bare URL.", responses=down)
    @ops.get("/ping", summary="As /health; TEI has it.", responses=down)
    @ops.get("/healthz", summary="As /health.", responses=down)
    @ops.get("/health", summary="Healthy: ready, and replicas answer.", responses=down)
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


def _add_information(ops: APIRouter, service: Service) -> None:
    @ops.get("/info", summary="Version, model, limits, effective configuration without secrets; TEI's fields too.")
    def info() -> Response:
        return _json(_info(service))

    @ops.get("/meta", summary="As /info; Weaviate asks here.")
    def meta() -> Response:
        return _json(_info(service))


def _add_models(ops: APIRouter, service: Service) -> None:
    @ops.get("/models", summary="The models that answer here, the default first, as the replica asked last has them.")
    def models() -> Response:
        return _json(_models(service.catalog))

    refusal = {"model": openai.ErrorReply}

    @ops.get(
        "/v1/models",
        summary="The names that `model` may say, as OpenAI lists them.",
        tags=["OpenAI"],
        responses={401: refusal},
    )
    def v1_models() -> openai.ModelsReply:
        return openai.models(service.catalog)

    @ops.get(
        "/v1/models/{name:path}",
        summary="One of them.",
        tags=["OpenAI"],
        responses={401: refusal, 404: refusal, 503: refusal},
    )
    def v1_model(name: str) -> openai.Model:
        return openai.model(service.catalog, name)


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


def _models(catalog: Catalog) -> dict[str, Any]:
    """With OpenAI's list beside ours, for its clients whose base URL lacks the /v1."""
    cards = ((name, state, catalog.card(name)) for name, state in catalog.states.items())
    listed = [{"id": name, "state": state, "card": card and asdict(card)} for name, state, card in cards]
    ours = {"default": next(iter(catalog.states), None), "models": listed, "aliases": catalog.aliases}
    return ours | openai.models(catalog).model_dump()


def _info(service: Service) -> dict[str, Any]:
    settings: Settings = service.settings
    card = service.catalog.current
    calls = settings.interactive_calls + settings.bulk_calls
    return tei.info(
        service.catalog, max_texts=settings.max_texts, calls=calls, auto_truncate=settings.auto_truncate
    ) | {
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
        "available_models": list(service.catalog.states),
        "configuration": settings.public(),
    }


def _rate(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0


def _json(body: object, status: int = 200) -> Response:
    return Response(orjson.dumps(body), status_code=status, media_type="application/json")
