"""A whole gateway in process, between fake replicas and a fake Redis, and a client that calls it."""

from __future__ import annotations

from typing import Any

import httpx

from embedding_service.app import create_app
from embedding_service.config import Settings
from embedding_service.service import Service
from tests.support.gateway import Gateway

SETTINGS = Settings(
    MAX_TEXTS=300, MAX_TEXT_BYTES=400, MAX_BODY_BYTES=20_000, OPENAI_MAX_INPUTS=200, REDIS_PASSWORD="a secret"
)


class Client:
    """Calls a gateway of its own, which runs in this process."""

    def __init__(self, settings: Settings = SETTINGS) -> None:
        self.gateway = Gateway(calls=8, chunk_bytes=1000, max_pending_bytes=15_000)
        self.gateway.balancer.answers_at_once = True
        g = self.gateway
        self.service = Service(
            settings=settings,
            metrics=g.metrics,
            l1=g.l1,
            epoch=g.epoch,
            flights=g.flights,
            store=g.store,  # type: ignore[arg-type]  # a fake
            admission=g.admission,
            balancer=g.balancer,  # type: ignore[arg-type]  # a fake
            ejections=g.retry.ejections,
            replicas=g.replicas,
            lanes=g.lanes,
            catalog=g.catalog,
            fill=g.fill,
            embedder=g.embedder,
        )
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(create_app(self.service)), base_url="http://gateway"
        )

    async def embed(self, *texts: str, **fields: Any) -> httpx.Response:
        return await self.http.post("/embed", json={"texts": texts} | fields)

    async def openai(self, given: Any, path: str = "/v1/embeddings", **fields: Any) -> httpx.Response:
        return await self.http.post(path, json={"input": given} | fields)

    async def tei(self, given: Any, path: str = "/embed", **fields: Any) -> httpx.Response:
        return await self.http.post(path, json={"inputs": given} | fields)

    @property
    def computed(self) -> list[str]:
        """Texts that went upstream, in their order."""
        return [text for call in self.gateway.balancer.sent for text in call.texts]

    async def close(self) -> None:
        await self.http.aclose()
        await self.gateway.close()
