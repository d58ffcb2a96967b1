"""Wiring and lifetime: builds the parts from settings, opens them in order, closes them in reverse."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI

from embedding_common.contract import Lane
from embedding_common.http import edge
from embedding_common.keys import Keys, parse_keys
from embedding_service.api import routes
from embedding_service.api.auth import Gate
from embedding_service.api.dialects.dialect import Limits
from embedding_service.api.framework import add_routes
from embedding_service.api.render import Renderer
from embedding_service.api.serving import LARGE_BODIES_BYTES, Serving
from embedding_service.cache.entry import Entry
from embedding_service.cache.epoch import Epoch
from embedding_service.cache.lru import LRU
from embedding_service.cache.null_store import NullStore
from embedding_service.cache.redis.client import RedisClient
from embedding_service.cache.redis.store import RedisStore
from embedding_service.core.audit import Audit
from embedding_service.core.catalog import Catalog
from embedding_service.core.embedder import Embedder
from embedding_service.core.fill import Fill, Landing
from embedding_service.core.query import Miss, Resolved
from embedding_service.core.singleflight import Flights
from embedding_service.observability.metrics import VERSION
from embedding_service.service import Service
from embedding_service.upstream.calls import Balancer, Replicas
from embedding_service.upstream.ejection import Ejections
from embedding_service.upstream.lanes import Admission, Lanes
from embedding_service.upstream.retry import Retry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from pydantic import SecretStr

    from embedding_service.config import Settings
    from embedding_service.observability.metrics import Metrics


def build_service(settings: Settings, metrics: Metrics) -> Service:
    """The parts of one gateway process, wired and not yet open."""
    l1 = LRU[Entry](max_entries=settings.cache_size)
    epoch = Epoch(forget=l1.clear, cell=metrics.board.epoch_cell)
    store = _store(settings, epoch, metrics)
    balancer = Balancer(settings.ml_base_url)
    ejections = Ejections()
    retry = Retry(ejections=ejections, metrics=metrics)
    replicas = Replicas(balancer=balancer, retry=retry, timeout_s=settings.ml_base_timeout_s)
    catalog = Catalog(
        fetch=replicas.models,
        probe=replicas.probe,
        recall=store.recall,
        remember=store.remember,
        aliases=settings.aliases(),
        unknown=settings.unknown_model,
    )
    admission = Admission(
        max_pending_bytes={
            Lane.INTERACTIVE: settings.max_pending_interactive_bytes,
            Lane.BULK: settings.max_pending_bulk_bytes,
        }
    )
    flights = Flights[Miss, Resolved](on_settled=admission.release_flight)
    landing = Landing(l1=l1, l1_ttl_s=settings.cache_ttl_s, flights=flights, store=store, catalog=catalog, epoch=epoch)
    lanes = Lanes(
        replicas=replicas,
        retry=retry,
        settle=landing.settle,
        chunk_bytes=settings.piece_bytes,
        max_texts=settings.max_texts,
        max_body_bytes=settings.max_body_bytes,
        calls={Lane.INTERACTIVE: settings.interactive_calls, Lane.BULK: settings.bulk_calls},
        call_timeout_s=settings.ml_base_timeout_s,
        admission=admission,
        metrics=metrics,
    )
    fill = Fill(landing=landing, store=store, upstream=lanes, epoch=epoch, metrics=metrics)
    audit = None
    if settings.check_hits:
        audit = Audit(one_in=settings.check_hits, compute=lanes.compute_aside, metrics=metrics)
    embedder = Embedder(
        l1=l1,
        epoch=epoch,
        flights=flights,
        fill=fill,
        entry_ttl_s=settings.redis_ttl_s,
        admission=admission,
        upstream=lanes,
        catalog=catalog,
        metrics=metrics,
        audit=audit,
    )
    return Service(
        settings=settings,
        metrics=metrics,
        l1=l1,
        epoch=epoch,
        flights=flights,
        store=store,
        admission=admission,
        balancer=balancer,
        ejections=ejections,
        replicas=replicas,
        lanes=lanes,
        catalog=catalog,
        fill=fill,
        embedder=embedder,
        audit=audit,
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
            await stack.enter_async_context(service.lanes)
            if service.audit is not None:
                await stack.enter_async_context(service.audit)
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
    add_routes(app, service)
    edge.answer_unknown_routes(app, refusals_of=routes.refusals_of)
    gate = _gate(settings)
    return edge.Edge(
        app,
        direct=routes.direct(service, _serving(service)),
        observe=service.metrics.observe,
        process=service,
        admit=gate.admit if gate.locks else None,
        refusals_of=routes.refusals_of,
    )


def _gate(settings: Settings) -> Gate:
    def keys(secret: SecretStr | None) -> Keys:
        return Keys(() if secret is None else parse_keys(secret.get_secret_value()))

    return Gate(
        keys=keys(settings.api_keys),
        admin_keys=keys(settings.admin_api_keys),
        open_paths=routes.open_paths(operator_paths_open=settings.operator_paths_open),
        admin_prefixes=routes.admin_paths(),
    )


def _serving(service: Service) -> Serving:
    settings = service.settings
    return Serving(
        embedder=service.embedder,
        catalog=service.catalog,
        renderer=Renderer(max_ready_bytes=settings.ready_json_bytes),
        limits=Limits(
            max_texts=settings.max_texts,
            max_text_bytes=settings.max_text_bytes,
            max_openai_inputs=settings.openai_max_inputs,
            accept_empty=settings.empty_texts == "accept",
        ),
        max_body_bytes=settings.max_body_bytes,
        large_bodies_bytes=max(settings.max_body_bytes, LARGE_BODIES_BYTES // settings.workers),
        auto_truncate=settings.auto_truncate,
        edition=settings.edition,
    )


def _store(settings: Settings, epoch: Epoch, metrics: Metrics) -> RedisStore | NullStore:
    if not settings.redis_enabled:
        return NullStore()
    client = RedisClient(
        host=settings.redis_host,
        port=settings.redis_port,
        password=settings.redis_password.get_secret_value() if settings.redis_password else None,
        epoch=epoch,
        metrics=metrics,
    )
    return RedisStore(client=client, timeout_s=settings.redis_timeout_s, metrics=metrics)
