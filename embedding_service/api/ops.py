"""What operators and probes call: health, readiness, information, statistics, clearing, metrics.

Each function takes the parts of the gateway and returns a reply; `routes.py` gives it a path.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import orjson
from fastapi import Response

from embedding_service.api.dialects import openai, tei
from embedding_service.core.query import Outcome
from embedding_service.observability.metrics import VERSION

if TYPE_CHECKING:
    from embedding_service.service import Service

# --- probes ---


def livez(_: Service) -> Response:
    return _json({"status": "alive"})


def readyz(service: Service) -> Response:
    reasons = service.unready()
    return _json({"status": "unready" if reasons else "ready", "reasons": reasons}, 503 if reasons else 200)


def well_known_live(_: Service) -> Response:
    return Response(status_code=204)


def well_known_ready(service: Service) -> Response:
    return Response(status_code=503 if service.unready() else 204)


def health(service: Service) -> Response:
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


# --- information ---


def info(service: Service) -> Response:
    settings = service.settings
    card = service.catalog.current
    calls = settings.interactive_calls + settings.bulk_calls
    fields_of_tei = tei.info(
        service.catalog, max_texts=settings.max_texts, calls=calls, auto_truncate=settings.auto_truncate
    )
    fields = {
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
    return _json(fields_of_tei | fields)


def models(service: Service) -> Response:
    """Replies with OpenAI's list beside ours, for its clients whose base URL lacks the /v1."""
    catalog = service.catalog
    cards = ((name, state, catalog.card(name)) for name, state in catalog.states.items())
    listed = [{"id": name, "state": state, "card": card and asdict(card)} for name, state, card in cards]
    ours = {"default": next(iter(catalog.states), None), "models": listed, "aliases": catalog.aliases}
    return _json(ours | openai.models(catalog).model_dump())


def v1_models(service: Service) -> openai.ModelsReply:
    return openai.models(service.catalog)


def v1_model(service: Service, name: str) -> openai.Model:
    return openai.model(service.catalog, name)


# --- the cache, and figures ---


def cache_stats(service: Service) -> Response:
    return _json(cache_figures(service))


async def cache_clear(service: Service) -> Response:
    service.metrics.publish()
    l1 = service.l1_figures["size"].total  # in all processes: the others clear before their next look-up
    l2 = await service.clear_cache()
    note = {} if l2 is not None or not service.store.enabled else {"note": "Redis is away; cleared when it is back"}
    return _json({"status": "cleared", "l1_cleared": l1, "l2_cleared": l2, **note})


def metrics(service: Service) -> Response:
    return Response(service.metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8")


def cache_figures(service: Service) -> dict[str, dict[str, Any]]:
    """Returns figures per text: l1.hits + l2.hits + joined + misses = requests. Texts that failed count as misses."""
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


def _rate(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0


def _json(body: object, status: int = 200) -> Response:
    return Response(orjson.dumps(body), status_code=status, media_type="application/json")
