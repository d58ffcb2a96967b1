"""The HTTP interface of the loaded models: `POST /embed`, `POST /tokenize`, and the operator's routes."""

from __future__ import annotations

import asyncio
import importlib.metadata
import logging
import os
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import orjson
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from embedding_common import contract, encoding, errors, native, refusals
from embedding_common.http import edge
from embedding_common.keys import bearer
from ml_base.machine.memory import resident_bytes

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from starlette.types import ASGIApp, Receive, Scope, Send

    from ml_base.config import Settings
    from ml_base.machine.threads import Threads
    from ml_base.metrics import Metrics
    from ml_base.models.models import Models

T = TypeVar("T")

EXIT_STUCK = 70  # sysexits.h: internal software error
_MAX_NAME_BYTES = 4096  # the largest body of a request that only names a model

log = logging.getLogger(__name__)

VERSION = importlib.metadata.version("embedding-service")


class TokenizeRequest(BaseModel):
    """Texts to take apart."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    texts: Annotated[list[str], Field(min_length=1)]
    model_id: str | None = None
    prompt_name: str | None = None
    add_special_tokens: bool = True


class ModelRequest(BaseModel):
    """A model by its id."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    model_id: str


@dataclass(slots=True)
class _Trace:
    """What the log says about one embed request; never a text."""

    texts: int
    lane: contract.Lane
    tokens: int = 0


class Replica:
    """The models with what the routes share: settings, metrics, and whether the replica drains."""

    def __init__(self, settings: Settings, models: Models, metrics: Metrics, threads: Threads) -> None:
        self.settings = settings
        self.models = models
        self.metrics = metrics
        self.threads = threads
        self.draining = False
        self._admin_keys = settings.admin_keys
        metrics.watch(waiting=models.waiting, draining=lambda: self.draining, running_for_s=models.running_for_s)

    def __repr__(self) -> str:
        return f"<Replica {self.settings.instance_id} draining={self.draining} {self.models!r}>"

    def drain(self) -> None:
        """Makes health answer 503, so that the balancer sends nothing new; what arrives is still answered."""
        self.draining = True

    def unhealthy(self) -> list[str]:
        """Returns the reasons why a balancer should send nothing here; none if all is well."""
        draining = ["draining"] if self.draining else []
        return draining + self.models.unhealthy(stuck_s=self.settings.stuck_s)

    async def end_when_stuck(self, end: Callable[[int], object] = os._exit) -> None:
        """Ends the process if a batch runs for too long: a thread that hangs in native code cannot be ended alone."""
        while limit_s := self.settings.stuck_exit_s:
            await asyncio.sleep(min(1.0, limit_s))
            if (running_s := self.models.running_for_s()) > limit_s:
                log.critical("inference is stuck for %.0f s: the process ends itself", running_s)
                end(EXIT_STUCK)

    async def embed(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers `POST /embed`: parses, computes, writes. Raises `Problem`, or `ClientGone` if the caller leaves."""
        started = time.perf_counter()
        limits = self.settings
        lane_header, timeout_header = (
            edge.header(scope, name) for name in (contract.PRIORITY_HEADER, contract.TIMEOUT_HEADER)
        )
        timeout_s = contract.parse_timeout_s(timeout_header)
        body = await edge.read_body(scope, receive, limit_bytes=limits.max_body_bytes)
        texts, request = native.parse(native.EmbedRequest, body, limits)
        trace = _Trace(len(texts), contract.choose_lane(lane_header, len(texts)))
        scope["state"]["trace"] = trace
        binary = contract.BINARY_TYPE in (edge.header(scope, "accept") or "")
        # a binary reply says which texts were cut; its reader refuses them, and keeps the vectors for other requests
        work = self._embed(request, trace.lane, truncate=binary or request.truncate is not False, timeout_s=timeout_s)
        embedded = await _unless_gone(receive, work)
        trace.tokens = int(embedded.tokens.sum())
        if binary:
            parts, content_type = [embedded.to_bytes()], contract.BINARY_TYPE
        else:
            parts, content_type = await self._json(embedded, request, started), "application/json"
        fingerprint = (contract.FINGERPRINT_HEADER.encode(), embedded.card.fingerprint.encode())
        await edge.send_bytes(send, 200, parts, content_type=content_type, headers=[fingerprint])

    async def _embed(
        self, request: native.EmbedRequest, lane: contract.Lane, *, truncate: bool, timeout_s: float | None
    ) -> contract.Embedded:
        started = time.monotonic()
        async with self.models.use(request.model_id, timeout_s=timeout_s) as model:
            if request.dimensions is not None:
                refusals.check_dimensions(request.dimensions, model.card)
            return await model.embed(
                request.texts,
                lane=lane,
                prompt_name=request.prompt_name,
                direction=request.truncation_direction or "right",
                truncate=truncate,
                timeout_s=None if timeout_s is None else max(0.0, timeout_s - (time.monotonic() - started)),
            )

    async def tokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers `POST /tokenize`: how a model reads texts. Raises `Problem`, `ClientGone`."""
        limits = self.settings
        body = await edge.read_body(scope, receive, limit_bytes=limits.max_body_bytes)
        request = native.read(TokenizeRequest, body)
        native.check_texts(
            request.texts, field="texts", max_texts=limits.max_texts, max_text_bytes=limits.max_text_bytes
        )
        native.check_tokenizable(request.texts, field="texts")
        async with self.models.use(request.model_id) as model:
            texts = await model.tokenize(
                request.texts, prompt_name=request.prompt_name, add_special_tokens=request.add_special_tokens
            )
        reply = contract.Tokenized(model.card.id, texts)
        await edge.send_bytes(send, 200, [orjson.dumps(reply)])

    async def change(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers `POST /models/load` and `/models/unload` when it is done, with what `/models` says then.

        Raises `Problem`, `ClientGone`.
        """
        if self._admin_keys and (bearer(scope) or b"") not in self._admin_keys:
            raise errors.Unauthorized("authorization: needs an admin key", field="authorization")
        request = native.read(ModelRequest, await edge.read_body(scope, receive, limit_bytes=_MAX_NAME_BYTES))
        await (self.models.load if scope["path"].endswith("/load") else self.models.unload)(request.model_id)
        await edge.send_bytes(send, 200, [orjson.dumps(self.listed())])

    async def _json(self, embedded: contract.Embedded, request: native.EmbedRequest, started: float) -> list[bytes]:
        vectors = encoding.fit_vectors(
            embedded.vectors, dimensions=request.dimensions, normalize=request.normalize is not False
        )
        rows = []
        for chunk in encoding.encode_rows(vectors, request.encoding_format):
            rows.append(chunk)
            await asyncio.sleep(0)  # other tasks get their turn: writing the digits of a chunk takes a millisecond
        return native.write_reply(
            rows,
            dimension=vectors.shape[1],
            texts=request.texts,
            model=embedded.card.id,
            took_s=time.perf_counter() - started,
            cached=0,
            edition=self.settings.edition,
        )

    def observe(self, scope: Scope, status: int, took_s: float) -> None:
        """Counts every reply, and logs one line for each embed request that has reached a lane."""
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
        reasons = self.unhealthy()
        if reasons:
            return 503, {"status": "unhealthy", "reasons": reasons, "instance": self.settings.instance_id}
        return 200, {"status": "healthy", "model": self.models.default_id, "instance": self.settings.instance_id}

    def listed(self) -> dict[str, Any]:
        """Returns what `/models` says, the default model first. A gateway learns cards here before its first text."""
        return {
            "default": self.models.default_id,
            "models": self.models.listed(),
            "threads": self.threads.count,
            "memory_bytes": resident_bytes(),
        }

    def info(self) -> dict[str, Any]:
        default = self.models.listed()[0]
        card: contract.ModelCard = default["card"]
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
            "batch_tokens": default["slice_tokens"],
            "available_models": self.models.ids,
            "configuration": self.settings.model_dump(),
        }


def create_app(replica: Replica) -> ASGIApp:
    """Returns the ASGI app of a replica. Its threads run between startup and shutdown of the app's lifespan."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with replica.models:
            log.info("instance=%s %r threads=%s", replica.settings.instance_id, replica, replica.threads)
            watch = asyncio.create_task(replica.end_when_stuck())
            try:
                yield
            finally:
                watch.cancel()

    app = FastAPI(title="ML-Base", version=VERSION, lifespan=lifespan, docs_url=None, redoc_url=None)
    refused: dict[int | str, dict[str, Any]] = {
        status: {"model": refusals.ErrorReply} for status, _ in refusals.STATUS.values()
    }
    app.add_api_route("/embed", _documented, methods=["POST"], responses=refused)
    app.add_api_route("/tokenize", _documented_tokenize, methods=["POST"], responses=refused)
    for path in ("/models/load", "/models/unload"):
        app.add_api_route(path, _documented_change, methods=["POST"], responses=refused)
    _add_operator_routes(app, replica)
    edge.answer_unknown_routes(app)
    direct = {
        "/embed": edge.guarded(replica.embed),
        "/tokenize": edge.guarded(replica.tokenize),
        "/models/load": edge.guarded(replica.change),
        "/models/unload": edge.guarded(replica.change),
    }
    return edge.Edge(app, direct=direct, observe=replica.observe, process=replica)


def _documented(body: native.EmbedRequest) -> native.EmbedReply:  # type: ignore[empty-body]  # never called
    """Embed texts, uncached. With `Accept: application/vnd.safetensors` the reply is binary (see
    embedding_common/contract.py): the model's own vectors at full dimension, token counts, and which texts were cut.
    """


def _documented_tokenize(body: TokenizeRequest) -> contract.Tokenized:  # type: ignore[empty-body]  # never called
    """How a model reads texts, uncut: ids, tokens, offsets in characters (null for special tokens)."""


def _documented_change(body: ModelRequest) -> dict[str, Any]:  # type: ignore[empty-body]  # never called
    """Load or unload one model of `ML_BASE_MODELS` in this replica. Needs a key of `ADMIN_API_KEYS`, if any are set."""


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
        """What is served, loaded or not, with what a gateway must know of it."""
        return _json_reply(replica.listed())

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


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Returns the result of `work`. Raises `ClientGone` once the caller hangs up: then `work` is cancelled."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(edge.disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise errors.ClientGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
