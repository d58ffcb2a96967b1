"""The parts of one running gateway, and what they say together about its health."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from embedding_common.contract import Lane
from embedding_service.observability.metrics import OTHER

if TYPE_CHECKING:
    from typing import Self

    from starlette.types import Scope

    from embedding_service.cache.entry import Entry
    from embedding_service.cache.lru import LRU
    from embedding_service.cache.redis.client import RedisCache
    from embedding_service.config import Settings
    from embedding_service.core.admission import Admission
    from embedding_service.core.audit import Drift
    from embedding_service.core.catalog import Catalog
    from embedding_service.core.embedder import Embedder
    from embedding_service.core.fill import Fill, Landed
    from embedding_service.core.query import Miss
    from embedding_service.core.singleflight import Flights
    from embedding_service.observability.metrics import Metrics
    from embedding_service.upstream.calls import Replicas
    from embedding_service.upstream.http import Balancer
from embedding_service.upstream.lanes import Upstream

PUBLISH_S = 0.5  # a sibling's gauges are at most this old; counters are never old


@dataclass
class Service:
    """What the routes need. `draining` is set at the first SIGTERM."""

    settings: Settings
    metrics: Metrics
    l1: LRU[Entry]
    flights: Flights[Miss, Landed]
    store: RedisCache
    admission: Admission
    balancer: Balancer
    replicas: Replicas
    upstream: Upstream
    catalog: Catalog
    fill: Fill
    embedder: Embedder
    drift: Drift | None = None
    draining: bool = False

    def __post_init__(self) -> None:
        """Shows figures that their owners already keep."""
        l1, gauge, tally = self.l1, self.metrics.gauge, self.metrics.tally
        self.l1_figures = {
            "size": gauge("l1_entries", "Vectors in L1.", lambda: len(l1)),
            "max_size": gauge("l1_max_entries", "Most vectors that L1 may hold.", lambda: l1.max_entries),
            "bytes": gauge("l1_bytes", "Memory of the vectors in L1.", lambda: l1.bytes),
            "evictions": tally("l1_evictions", "Vectors pushed out of L1 by newer ones.", lambda: l1.evictions),
            "expired": tally("l1_expired", "Vectors found in L1 past their time.", lambda: l1.expired),
        }
        gauge("l2_enabled", "1 unless REDIS_ENABLED is false.", lambda: self.store.enabled)
        gauge("l2_connected", "1 while Redis is in use.", lambda: self.store.connected)
        gauge("replicas_reachable", "1 while a replica answers.", lambda: self.catalog.reachable)
        gauge("replicas_ejected", "Replicas that answered nonsense, tried rarely.", lambda: self.replicas.ejected)
        gauge("flights", "Texts on their way from L2 or a replica.", lambda: len(self.flights))
        for lane in Lane:
            gauge(
                f"pending_{lane}_bytes",
                f"Text admitted to the {lane} lane and not yet computed.",
                partial(self.admission.pending_bytes, lane),
            )

    async def __aenter__(self) -> Self:
        self._publishing = asyncio.create_task(self._publish())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._publishing.cancel()
        await asyncio.gather(self._publishing, return_exceptions=True)

    async def _publish(self) -> None:
        """Keeps this process's gauges where its siblings, who may be asked for them, can see them."""
        while True:
            self.metrics.publish()
            self.fill.catch_up()  # an idle process too forgets what a sibling was told to clear
            await asyncio.sleep(PUBLISH_S)

    def drain(self) -> None:
        self.draining = True

    def observe(self, scope: Scope, status: int, duration_s: float) -> None:
        """One request is over."""
        path = scope["path"]
        if path == "/" and scope["method"] != "POST":
            path = OTHER  # a probe of the base URL, not a request to embed
        self.metrics.count_reply(path, status, duration_s)

    def unready(self) -> list[str]:
        """Why nothing, not even what is cached, should be asked of this gateway; empty if it may."""
        reasons = ["draining: the process is stopping"] if self.draining else []
        if self.catalog.current is None:
            reasons.append("no model is known: no replica has answered, and none is remembered in Redis")
        return reasons

    def unhealthy(self) -> list[str]:
        """Why a text that is not cached would not be answered; empty if it would."""
        reasons = self.unready()
        if not self.catalog.reachable:
            reasons.append(f"no replica answers at {self.settings.ml_base_shown()}")
        return reasons
