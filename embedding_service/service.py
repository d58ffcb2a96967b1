"""The parts of one running gateway, and what they say together about its health."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from embedding_common.contract import Lane

if TYPE_CHECKING:
    from typing import Self

    from embedding_service.cache.entry import Entry
    from embedding_service.cache.epoch import Epoch
    from embedding_service.cache.lru import LRU
    from embedding_service.cache.null_store import NullStore
    from embedding_service.cache.redis.store import RedisStore
    from embedding_service.config import Settings
    from embedding_service.core.audit import Audit
    from embedding_service.core.catalog import Catalog
    from embedding_service.core.embedder import Embedder
    from embedding_service.core.fill import Fill
    from embedding_service.core.query import Miss, Resolved
    from embedding_service.core.singleflight import Flights
    from embedding_service.observability.metrics import Metrics
    from embedding_service.upstream.calls import Balancer, Replicas
    from embedding_service.upstream.ejection import Ejections
    from embedding_service.upstream.lanes import Admission, Lanes

PUBLISH_S = 0.5  # a gauge of another worker is at most this old; counters are never old


@dataclass(kw_only=True)
class Service:
    """The parts that the routes need. `draining` is set at the first SIGTERM."""

    settings: Settings
    metrics: Metrics
    l1: LRU[Entry]
    epoch: Epoch
    flights: Flights[Miss, Resolved]
    store: RedisStore | NullStore
    admission: Admission
    balancer: Balancer
    ejections: Ejections
    replicas: Replicas
    lanes: Lanes
    catalog: Catalog
    fill: Fill
    embedder: Embedder
    audit: Audit | None = None
    draining: bool = False

    def __post_init__(self) -> None:
        """Shows the numbers that their owners already keep."""
        l1, gauge, mirror = self.l1, self.metrics.gauge, self.metrics.mirror
        self.l1_figures = {
            "size": gauge("l1_entries", "Vectors in L1.", lambda: len(l1)),
            "max_size": gauge("l1_max_entries", "Most vectors that L1 may hold.", lambda: l1.max_entries),
            "bytes": gauge("l1_bytes", "Memory of the vectors in L1.", lambda: l1.bytes),
            "evictions": mirror("l1_evictions", "Vectors pushed out of L1 by newer ones.", lambda: l1.evictions),
            "expired": mirror("l1_expired", "Vectors found in L1 past their time.", lambda: l1.expired),
        }
        gauge("l2_enabled", "1 unless REDIS_ENABLED is false.", lambda: self.store.enabled)
        gauge("l2_connected", "1 while Redis is in use.", lambda: self.store.connected)
        gauge("replicas_reachable", "1 while a replica answers.", lambda: self.catalog.reachable)
        gauge("replicas_ejected", "Replicas that answered nonsense, tried rarely.", lambda: len(self.ejections))
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
        """Keeps the gauges of this process where the other workers, which may be asked for them, can see them."""
        while True:
            self.metrics.publish()
            self.epoch.catch_up()  # an idle process too forgets what another worker was told to clear
            await asyncio.sleep(PUBLISH_S)

    async def clear_cache(self) -> int | None:
        """Forgets every cached vector, here and in L2; returns how many L2 held (None: it is away, and will follow)."""
        self.epoch.begin()
        return await self.store.clear()

    def drain(self) -> None:
        self.draining = True

    def unready(self) -> list[str]:
        """The reasons why this gateway should not even be asked for cached texts; empty if it may."""
        reasons = ["draining: the process is stopping"] if self.draining else []
        if self.catalog.current is None:
            reasons.append("no model is known: no replica has answered, and none is remembered in Redis")
        return reasons

    def unhealthy(self) -> list[str]:
        """The reasons why a text that is not cached would not be answered; empty if it would."""
        reasons = self.unready()
        if not self.catalog.reachable:
            reasons.append(f"no replica answers at {self.settings.ml_base_shown()}")
        return reasons
