"""Wiring and lifetime: builds the parts from settings, opens them in order, closes them in reverse."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI

from embedding_service.admission import Admission
from embedding_service.api import native, ops
from embedding_service.catalog import Catalog
from embedding_service.embedder import Embedder
from embedding_service.entry import Entry
from embedding_service.fill import Fill, Landed
from embedding_service.lru import LRU
from embedding_service.metrics import VERSION
from embedding_service.redis_cache import NoCache, RedisCache
from embedding_service.service import Service
from embedding_service.singleflight import Flights
from embedding_service.upstream import Balancer, Miss, Upstream
from embedding_service.vectors import Renderer
from ml_base import asgi
from ml_base.wire import Lane

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from embedding_service.config import Settings
    from embedding_service.metrics import Metrics


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
    upstream = Upstream(
        balancer=balancer,
        timeout_s=settings.ml_base_timeout_s,
        piece_bytes=settings.piece_bytes,
        calls={Lane.INTERACTIVE: settings.interactive_calls, Lane.BULK: settings.bulk_calls},
        admission=admission,
        metrics=metrics,
    )
    catalog = Catalog(fetch=upstream.fetch_card, recall=store.recall, remember=store.remember)
    l1 = LRU[Entry](max_entries=settings.cache_size, size_of=Entry.size_bytes)
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
    embedder = Embedder(
        l1=l1,
        flights=flights,
        fill=fill,
        entry_ttl_s=settings.redis_ttl_s,
        admission=admission,
        upstream=upstream,
        catalog=catalog,
        metrics=metrics,
    )
    return Service(settings, metrics, l1, flights, store, admission, balancer, upstream, catalog, fill, embedder)


def create_app(service: Service, *, started: Callable[[], None] | None = None) -> asgi.Edge:
    """The ASGI application over `service`, which its lifespan opens and closes. `started` is called in between."""
    settings = service.settings

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            # closed in reverse: no new fills, then no calls, then the writes they left behind
            await stack.enter_async_context(service.store)
            await stack.enter_async_context(service.balancer)
            await stack.enter_async_context(service.upstream)
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
    )
    dialect = native.NativeDialect(
        embedder=service.embedder,
        catalog=service.catalog,
        renderer=Renderer(max_ready_bytes=settings.ready_json_bytes),
        max_texts=settings.max_texts,
        max_text_bytes=settings.max_text_bytes,
        max_body_bytes=settings.max_body_bytes,
        edition=settings.edition,
    )
    native.document(app)
    app.include_router(ops.router(service))
    asgi.answer_unknown_routes(app)
    direct = {"/embed": asgi.guarded(dialect.embed)}
    return asgi.Edge(app, direct=direct, observe=service.observe, draining=lambda: service.draining)


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
