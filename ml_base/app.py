"""The HTTP face of one model: `POST /embed` and the operator's routes, wired and torn down in one place."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import os
import time
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import orjson
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from ml_base import asgi, errors, native, wire
from ml_base.metrics import Metrics
from ml_base.models import ServedModel
from ml_base.slices import SliceLimits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine

    from starlette.types import ASGIApp, Receive, Scope, Send

    from ml_base.config import Settings
    from ml_base.models import LoadedModel
    from ml_base.threads import Threads

T = TypeVar("T")

log = logging.getLogger(__name__)

VERSION = importlib.metadata.version("embedding-service")

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_STATM = Path("/proc/self/statm")


@dataclass(slots=True)
class _Trace:
    """What the log says of one embed request; never a text."""

    texts: int
    lane: wire.Lane
    tokens: int = 0


class Replica:
    """One served model with what its routes share: settings, metrics, and whether it is being taken away."""

    def __init__(self, settings: Settings, loaded: LoadedModel, threads: Threads) -> None:
        self.settings = settings
        self.threads = threads
        self.metrics = Metrics()
        self.draining = False
        self.model = ServedModel(
            loaded,
            limits=SliceLimits(
                max_texts=settings.max_batch_texts,
                max_tokens=settings.batch_tokens(threads.count),
                patience_s=settings.batch_timeout_ms / 1000,
            ),
            max_queue_texts=settings.max_queue_texts,
            bulk_share=settings.bulk_share,
            observer=self.metrics,
            nice=settings.nice,
        )
        self.metrics.watch(
            self.model.card,
            threads=threads.count,
            waiting=self.model.batcher.reserved,
            draining=lambda: self.draining,
            running_for_s=self.model.batcher.running_for_s,
        )

    def __repr__(self) -> str:
        return f"<Replica {self.settings.instance_id} draining={self.draining} {self.model!r}>"

    def drain(self) -> None:
        """From now on health says no, so that the balancer sends nothing new; what arrives is still answered."""
        self.draining = True

    def troubles(self) -> list[str]:
        """Why a balancer should send nothing here; empty when all is well."""
        draining = ["draining"] if self.draining else []
        return draining + self.model.troubles(stuck_s=self.settings.stuck_s)

    async def embed(self, scope: Scope, receive: Receive, send: Send) -> None:
        """`POST /embed`: parse, compute unless the caller hangs up, write."""
        started = time.perf_counter()
        limits = self.settings
        lane_header, timeout_header = (asgi.header(scope, name) for name in (wire.PRIORITY_HEADER, wire.TIMEOUT_HEADER))
        timeout_s = wire.parse_timeout_s(timeout_header)
        body = await asgi.read_body(scope, receive, limit_bytes=limits.max_body_bytes)
        request = native.parse(body, max_texts=limits.max_texts, max_text_bytes=limits.max_text_bytes)
        native.check_model(request.model_id, [self.model.card.id])
        native.check_dimensions(request.dimensions, self.model.card)
        trace = _Trace(len(request.texts), wire.choose_lane(lane_header, len(request.texts)))
        scope["state"]["trace"] = trace
        binary = wire.BINARY_TYPE in (asgi.header(scope, "accept") or "")
        embedded = await _unless_gone(
            receive,
            self.model.embed(
                request.texts,
                lane=trace.lane,
                prompt_name=request.prompt_name,
                direction=request.truncation_direction or "right",
                # a binary reply says which texts were cut; its reader refuses, and keeps the vectors for others
                truncate=binary or request.truncate is not False,
                timeout_s=timeout_s,
            ),
        )
        trace.tokens = int(embedded.tokens.sum())
        if binary:
            parts, content_type = [embedded.to_bytes()], wire.BINARY_TYPE
        else:
            parts, content_type = await self._json(embedded, request, started), "application/json"
        fingerprint = (wire.FINGERPRINT_HEADER.encode(), embedded.card.fingerprint.encode())
        await asgi.send_bytes(send, 200, parts, content_type=content_type, headers=[fingerprint])

    async def _json(self, embedded: wire.Embedded, request: native.EmbedRequest, started: float) -> list[bytes]:
        vectors = native.shape(
            embedded.vectors, dimensions=request.dimensions, normalize=request.normalize is not False
        )
        rows = []
        for chunk in native.encode_rows(vectors, request.encoding_format):
            rows.append(chunk)
            await asyncio.sleep(0)  # others get their turn between the milliseconds that digits take
        return native.assemble_reply(
            rows,
            dimension=vectors.shape[1],
            texts=len(vectors),
            model=embedded.card.id,
            took_s=time.perf_counter() - started,
            cached=0,
            edition=self.settings.edition,
        )

    def observe(self, scope: Scope, status: int, took_s: float) -> None:
        """Counts every reply; embed requests that got as far as a lane leave one line in the log."""
        self.metrics.request(scope["path"], status)
        state = scope["state"]
        trace: _Trace | None = state.get("trace")
        if trace is None:
            return
        if status == 200:  # noqa: PLR2004 - the status of an answer
            self.metrics.answered(trace.lane, took_s)
        log.info(
            "request_id=%s texts=%d tokens=%d lane=%s ms=%.1f status=%d",
            *(state["request_id"], trace.texts, trace.tokens, trace.lane, took_s * 1000, status),
        )

    def health(self) -> tuple[int, dict[str, Any]]:
        reasons = self.troubles()
        if reasons:
            return 503, {"status": "unhealthy", "reasons": reasons, "instance": self.settings.instance_id}
        return 200, {"status": "healthy", "model": self.model.card.id, "instance": self.settings.instance_id}

    def models(self) -> dict[str, Any]:
        """The default model first; a gateway learns its card here before it has sent anything."""
        served = {
            "card": asdict(self.model.card),
            "state": "ready",
            "self_test": self.model.self_test,  # lowest cosine to torch in float32; null: it is torch in float32
            "threads": self.threads.count,
            "memory_bytes": _resident_bytes(),
        }
        return {"default": self.model.card.id, "models": [served]}

    def info(self) -> dict[str, Any]:
        card = self.model.card
        return {
            "service": "ml-base",
            "version": VERSION,
            "edition": self.settings.edition,
            "instance": self.settings.instance_id,
            "model": card.id,
            "dimension": card.dimension,
            "fingerprint": card.fingerprint,
            "backend": card.backend,
            "dtype": card.dtype,
            "threads": {"count": self.threads.count, "reason": self.threads.reason},
            "batch_tokens": self.settings.batch_tokens(self.threads.count),
            "available_models": [card.id],
            "configuration": self.settings.model_dump(),
        }


def create_app(replica: Replica) -> ASGIApp:
    """The routes of a replica. Its threads run between startup and shutdown of the app's lifespan."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with replica.model:
            log.info("instance=%s %r threads=%s", replica.settings.instance_id, replica, replica.threads)
            yield

    app = FastAPI(title="ML-Base", version=VERSION, lifespan=lifespan, redoc_url=None)
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": native.ErrorReply} for status, _ in native.STATUS.values()
    }
    app.add_api_route("/embed", _documented, methods=["POST"], responses=refusals)
    _add_operator_routes(app, replica)
    asgi.answer_unknown_routes(app)
    direct = {"/embed": asgi.guarded(replica.embed)}
    return asgi.Edge(app, direct=direct, observe=replica.observe, draining=lambda: replica.draining)


def _documented(body: native.EmbedRequest) -> native.EmbedReply:  # type: ignore[empty-body]  # never called
    """Embed texts, uncached. With `Accept: application/vnd.safetensors` the reply is binary (see ml_base/wire.py):
    the model's own vectors at full dimension, token counts, and which texts were cut.
    """


def _add_operator_routes(app: FastAPI, replica: Replica) -> None:
    @app.get("/health")
    async def health() -> Response:
        """200 while the balancer may send texts here, else 503 with the reasons. Never behind a batch."""
        status, body = replica.health()
        return _json_reply(body, status)

    @app.get("/livez")
    async def livez() -> Response:
        """200 while the process answers at all."""
        return _json_reply({"status": "alive"})

    @app.get("/models")
    async def models() -> Response:
        """What is served, with what a gateway must know of it."""
        return _json_reply(replica.models())

    @app.get("/info")
    async def info() -> Response:
        """Version, limits and effective configuration."""
        return _json_reply(replica.info())

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus text format."""
        return Response(replica.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)


def _json_reply(body: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")


def _resident_bytes() -> int:
    return int(_STATM.read_text().split()[1]) * _PAGE_BYTES


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, or `ClientGone` once the caller hangs up: then `work` is cancelled."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(asgi.disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise errors.ClientGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
