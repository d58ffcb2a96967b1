"""Wiring and lifetime: builds the parts from settings, opens them in order, closes them in reverse."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI

from embedding_common.contract import Lane
from embedding_common.http import edge
from embedding_common.keys import Keys, parse_keys
from embedding_service.api import docs, ops
from embedding_service.api.auth import Gate
from embedding_service.api.dialects.native import NativeDialect
from embedding_service.api.dialects.openai import OpenAIDialect
from embedding_service.api.dialects.tei import TeiDialect
from embedding_service.api.dialects.weaviate import WeaviateDialect
from embedding_service.api.document import document
from embedding_service.api.render import Renderer
from embedding_service.api.routes import Dialects, words
from embedding_service.api.serving import LARGE_BODIES_BYTES, Serving
from embedding_service.cache.entry import Entry
from embedding_service.cache.lru import LRU
from embedding_service.cache.redis.client import NoCache, RedisCache
from embedding_service.core.admission import Admission
from embedding_service.core.audit import Drift
from embedding_service.core.catalog import Catalog
from embedding_service.core.embedder import Embedder
from embedding_service.core.fill import Fill, Landed
from embedding_service.core.query import Miss
from embedding_service.core.singleflight import Flights
from embedding_service.observability.metrics import VERSION
from embedding_service.service import Service
from embedding_service.upstream.calls import Replicas
from embedding_service.upstream.http import Balancer
from embedding_service.upstream.lanes import Upstream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from pydantic import SecretStr

    from embedding_service.config import Settings
    from embedding_service.observability.metrics import Metrics


def build_service(settings: Settings, metrics: Metrics) -> Service:
    """The parts of one gateway process, wired and not yet open."""
    store = _store(settings, metrics)
    admission = Admission(
        max_pending_bytes={
            Lane.INTERACTIVE: settings.max_pending_interactive_bytes,
            Lane.BULK: settings.max_pending_bulk_bytes,
        }
    )
    balancer = Balancer(settings.ml_base_url)
    replicas = Replicas(balancer=balancer, timeout_s=settings.ml_base_timeout_s, metrics=metrics)
    upstream = Upstream(
        replicas=replicas,
        piece_bytes=settings.piece_bytes,
        max_texts=settings.max_texts,
        max_body_bytes=settings.max_body_bytes,
        calls={Lane.INTERACTIVE: settings.interactive_calls, Lane.BULK: settings.bulk_calls},
        admission=admission,
        metrics=metrics,
    )
    catalog = Catalog(
        fetch=replicas.models,
        probe=replicas.probe,
        recall=store.recall,
        remember=store.remember,
        aliases=settings.aliases(),
        unknown=settings.unknown_model,
    )
    l1 = LRU[Entry](max_entries=settings.cache_size)
    flights = Flights[Miss, Landed](
        on_settled=lambda flight: admission.release(flight.payload.lane, flight.payload.work_bytes)
    )
    fill = Fill(
        l1=l1,
        l1_ttl_s=settings.cache_ttl_s,
        flights=flights,
        store=store,
        upstream=upstream,
        catalog=catalog,
        metrics=metrics,
    )
    drift = None
    if settings.check_hits:
        drift = Drift(one_in=settings.check_hits, compute=upstream.compute_aside, metrics=metrics)
    embedder = Embedder(
        l1=l1,
        flights=flights,
        fill=fill,
        entry_ttl_s=settings.redis_ttl_s,
        admission=admission,
        upstream=upstream,
        catalog=catalog,
        metrics=metrics,
        drift=drift,
    )
    return Service(
        settings, metrics, l1, flights, store, admission, balancer, replicas, upstream, catalog, fill, embedder, drift
    )


def create_app(service: Service, *, started: Callable[[], None] | None = None) -> edge.Edge:
    """The ASGI application over `service`, which its lifespan opens and closes. `started` is called in between."""
    settings = service.settings

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            # closed in reverse: no new fills, then no calls, then the writes they left behind
            await stack.enter_async_context(service.store)
            await stack.enter_async_context(service.balancer)
            await stack.enter_async_context(service.upstream)
            if service.drift is not None:
                await stack.enter_async_context(service.drift)
            await stack.enter_async_context(service.fill)
            await stack.enter_async_context(service.catalog)
            await stack.enter_async_context(service)
            if started is not None:
                started()
            yield

    app = FastAPI(
        title="Embedding service",
        version=VERSION,
        summary="Text embeddings from a two-tier cache over replicated CPU model servers.",
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )
    document(app)
    app.include_router(ops.router(service))
    app.include_router(docs.router(title=app.title))
    edge.answer_unknown_routes(app, words=words)
    direct = _dialects(service).routes()
    gate = _gate(settings)
    return edge.Edge(
        app,
        direct=direct,
        observe=service.observe,
        draining=lambda: service.draining,
        admit=gate.admit if gate.locks else None,
        words=words,
    )


def _gate(settings: Settings) -> Gate:
    def keys(secret: SecretStr | None) -> Keys:
        return Keys(() if secret is None else parse_keys(secret.get_secret_value()))

    return Gate(
        keys=keys(settings.api_keys),
        admin_keys=keys(settings.admin_api_keys),
        operator_paths_open=settings.operator_paths_open,
    )


def _dialects(service: Service) -> Dialects:
    settings = service.settings
    accept_empty = settings.empty_texts == "accept"
    serving = Serving(
        embedder=service.embedder,
        catalog=service.catalog,
        renderer=Renderer(max_ready_bytes=settings.ready_json_bytes),
        max_texts=settings.max_texts,
        max_text_bytes=settings.max_text_bytes,
        max_body_bytes=settings.max_body_bytes,
        large_bodies_bytes=max(settings.max_body_bytes, LARGE_BODIES_BYTES // settings.workers),
        auto_truncate=settings.auto_truncate,
    )
    return Dialects(
        serving,
        native=NativeDialect(serving, edition=settings.edition),
        openai=OpenAIDialect(serving, max_inputs=settings.openai_max_inputs, accept_empty=accept_empty),
        tei=TeiDialect(serving, catalog=service.catalog, replicas=service.replicas, accept_empty=accept_empty),
        weaviate=WeaviateDialect(serving),
    )


def _store(settings: Settings, metrics: Metrics) -> RedisCache:
    if not settings.redis_enabled:
        return NoCache(metrics=metrics)
    return RedisCache(
        host=settings.redis_host,
        port=settings.redis_port,
        password=settings.redis_password.get_secret_value() if settings.redis_password else None,
        timeout_s=settings.redis_timeout_s,
        metrics=metrics,
    )
