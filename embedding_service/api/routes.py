"""The table of routes. To add a path is to add a row.

What is derived from it: which function answers (here and in `framework.py`), the OpenAPI document (`framework.py`), the
labels of the metrics, who may call a path (`auth.Gate`), and in which dialect a request is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from embedding_common import native as common
from embedding_common.http import edge
from embedding_service.api import docs, ops, tokenize
from embedding_service.api.auth import Access
from embedding_service.api.dialects import native, openai, tei, weaviate
from embedding_service.api.serving import REFUSALS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from starlette.types import ASGIApp, Scope

    from embedding_common.http.edge import ErrorBody
    from embedding_service.api.dialects.dialect import Dialect, Limits, Refusals
    from embedding_service.api.serving import Serving
    from embedding_service.service import Service

    Handler: TypeAlias = Callable[[Service, bytes, Limits, str], Awaitable[bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One row: one or more paths that are the same to a caller.

    Exactly one of `dialects`, `handler` and `operation` answers. The first two are for POSTs whose cost counts, and are
    called past the framework. A row without any of them belongs to the framework itself.
    """

    paths: tuple[str, ...]
    method: Literal["GET", "POST"] = "GET"

    dialects: tuple[Dialect, ...] = ()
    """Texts are embedded; if there are several dialects, the body tells which one it speaks."""
    handler: Handler | None = None
    """Makes the JSON of a reply from a body."""
    operation: Callable[..., Any] | None = None
    """Called by the framework, with the `Service` and the path's parameters."""

    access: Access = Access.KEY
    refusals: Refusals = native.REFUSALS
    """How this path refuses, as long as the body has not told another dialect."""
    label: str | None = None
    """The route that the metrics count these paths under; None: "other"."""

    # The rest is for the OpenAPI document alone.
    name: str = ""
    """The beginning of the operation's id, from which clients may have been generated."""
    summary: str | None = None
    description: str = ""
    tags: tuple[str, ...] = ("operations",)
    request: Any = None
    reply: Any = None
    examples: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    status: int = 200
    refused: tuple[int, ...] = ()
    """Statuses of refusals, beside those that `access` or the dialects bring."""
    unready: bool = False
    """Whether status 503 is a reply that gives reasons, not a refusal."""
    documented: bool = True

    @property
    def direct(self) -> bool:
        """Whether requests go past the framework."""
        return bool(self.dialects) or self.handler is not None


_HEADERS = """

Request headers: `x-priority: interactive|bulk`, `x-request-timeout-ms`, `x-request-id`, `x-cache-ttl` (seconds),
`cache-control: no-cache` (compute anew, and store). Reply headers: `x-request-id`, `x-cache: hit=n;miss=n`, `x-tokens`,
`x-truncated`, `x-model-fingerprint`, `server-timing`."""

# The order counts where two rows share a path: the framework names the method of the first in a 405.
ROUTES = (
    # --- what embeds ---
    Route(
        paths=("/embed", "/"),  # Hugging Face's clients post to the URL as it was given
        method="POST",
        dialects=(native.NATIVE, tei.TEI, openai.OPENAI),
        label="/embed",
        name="_embed",
        description="Embed texts, from the cache where possible: `texts` are answered with an object, `inputs` as TEI "
        "does." + _HEADERS,
        tags=("embed",),
        request=native.NativeEmbedRequest | tei.TeiEmbedRequest,
        reply=common.EmbedReply | list[list[float]],
        examples=native.EXAMPLES | tei.EXAMPLES,
    ),
    Route(
        paths=("/v1/embeddings", "/embeddings"),  # the second for a base URL without /v1
        method="POST",
        dialects=(openai.OPENAI,),
        refusals=openai.REFUSALS,
        label="/v1/embeddings",
        name="_embeddings",
        description="Embed texts as OpenAI does. Token ids are those of cl100k_base, and are embedded as the text they "
        "stand for." + _HEADERS,
        tags=("OpenAI",),
        request=openai.EmbeddingsRequest,
        reply=openai.EmbeddingsReply,
        examples=openai.EXAMPLES,
    ),
    Route(
        paths=("/vectors",),
        method="POST",
        dialects=(weaviate.WEAVIATE,),
        label="/vectors",
        name="_vectors",
        description="Embed one text as Weaviate's text2vec-transformers asks for it." + _HEADERS,
        tags=("Weaviate",),
        request=weaviate.VectorsRequest,
        reply=weaviate.VectorsReply,
        examples=weaviate.EXAMPLES,
    ),
    Route(
        paths=("/tokenize",),
        method="POST",
        handler=tokenize.tokenize,
        refusals=tei.REFUSALS,
        name="_tokenize",
        description="The served model's own tokens, as TEI gives them.",
        tags=("TEI",),
        request=tokenize.TokenizeRequest,
        reply=list[list[tokenize.Token]],
        examples=tokenize.EXAMPLES,
    ),
    # --- what probes ask ---
    Route(
        paths=("/livez",),
        operation=ops.livez,
        access=Access.ALWAYS,
        summary="The process runs; says nothing of Redis or replicas.",
    ),
    Route(
        paths=("/readyz",),
        operation=ops.readyz,
        access=Access.OPERATOR,
        summary="Ready to answer what is cached: not draining, and a model is known.",
        unready=True,
    ),
    Route(
        paths=("/.well-known/live",),
        operation=ops.well_known_live,
        access=Access.OPERATOR,
        summary="As /livez; Weaviate asks here.",
        status=204,
    ),
    Route(
        paths=("/.well-known/ready",),
        operation=ops.well_known_ready,
        access=Access.OPERATOR,
        summary="As /readyz; Weaviate asks here.",
        status=204,
        unready=True,
    ),
    Route(
        paths=("/health",),
        operation=ops.health,
        access=Access.OPERATOR,
        summary="Healthy: ready, and replicas answer.",
        unready=True,
    ),
    Route(paths=("/healthz",), operation=ops.health, access=Access.OPERATOR, summary="As /health.", unready=True),
    Route(
        paths=("/ping",),
        operation=ops.health,
        access=Access.OPERATOR,
        summary="As /health; TEI has it.",
        unready=True,
    ),
    Route(
        paths=("/",),
        operation=ops.health,
        access=Access.OPERATOR,
        summary="As /health: what a client finds that was given the bare URL.",
        unready=True,
    ),
    # --- information ---
    Route(
        paths=("/info",),
        operation=ops.info,
        summary="Version, model, limits, effective configuration without secrets; TEI's fields too.",
    ),
    Route(paths=("/meta",), operation=ops.info, name="meta", summary="As /info; Weaviate asks here."),
    Route(
        paths=("/models",),
        operation=ops.models,
        summary="The models that answer here, the default first, as the replica asked last has them.",
    ),
    Route(
        paths=("/v1/models",),
        operation=ops.v1_models,
        refusals=openai.REFUSALS,
        summary="The names that `model` may say, as OpenAI lists them.",
        tags=("operations", "OpenAI"),
        reply=openai.ModelsReply,
    ),
    Route(
        paths=("/v1/models/{name:path}",),
        operation=ops.v1_model,
        refusals=openai.REFUSALS,
        summary="One of them.",
        tags=("operations", "OpenAI"),
        reply=openai.Model,
        refused=(404, 503),
    ),
    # --- the cache, and figures ---
    Route(paths=("/cache/stats",), operation=ops.cache_stats, summary="Hits and misses per text and per tier."),
    Route(
        paths=("/cache/clear",),
        method="POST",
        operation=ops.cache_clear,
        access=Access.ADMIN,
        summary="Forget every cached vector, in every gateway and in Redis.",
    ),
    Route(paths=("/metrics",), operation=ops.metrics, access=Access.OPERATOR, summary="Prometheus."),
    # --- documentation ---
    Route(paths=("/openapi.json",), access=Access.OPERATOR, documented=False),  # the framework's own
    Route(paths=("/docs",), operation=docs.docs, access=Access.OPERATOR, documented=False),
    Route(paths=("/docs/swagger-ui-bundle.js",), operation=docs.script, access=Access.OPERATOR, documented=False),
    Route(paths=("/docs/swagger-ui.css",), operation=docs.style, access=Access.OPERATOR, documented=False),
)


def direct(service: Service, serving: Serving) -> dict[str, ASGIApp]:
    """Returns the apps of the paths that `edge.Edge` sends past the framework. They answer every problem themselves."""
    apps: dict[str, ASGIApp] = {}
    for route in ROUTES:
        if route.dialects:
            endpoint = serving.embed_endpoint(route.dialects)
        elif route.handler is not None:
            endpoint = serving.json_endpoint(route.paths[0][1:], partial(route.handler, service))
        else:
            continue
        apps |= dict.fromkeys(route.paths, edge.guarded(endpoint, refusals_of=refusals_of))
    return apps


def metric_labels() -> dict[str, str]:
    """Returns path -> the route that its requests are counted under; all other paths are counted as "other"."""
    return {path: route.label for route in ROUTES if route.label is not None for path in route.paths}


def open_paths(*, operator_paths_open: bool) -> frozenset[str]:
    """Returns the paths that need no key to be read."""
    access = {Access.ALWAYS, Access.OPERATOR} if operator_paths_open else {Access.ALWAYS}
    return frozenset(path for route in ROUTES if route.access in access for path in route.paths)


def admin_paths() -> tuple[str, ...]:
    """Returns the paths that need an admin key, if there are any."""
    return tuple(path for route in ROUTES if route.access is Access.ADMIN for path in route.paths)


_BY_PATH = {path: route.refusals.error_body for route in ROUTES for path in route.paths}
_BY_FOLDER = {path.split("/")[1]: error_body for path, error_body in _BY_PATH.items() if path.count("/") > 1}


def refusals_of(scope: Scope) -> ErrorBody:
    """Returns the function that writes a refusal in the dialect of a request.

    That is the dialect of its body, if it is known, else that of its path. A path that has no row is refused as the
    others of its first folder: `/v1/...` as OpenAI does.
    """
    known: ErrorBody | None = scope["state"].get(REFUSALS)
    if known is not None:
        return known
    path: str = scope["path"]
    if path in _BY_PATH:
        return _BY_PATH[path]
    folder = path.split("/")[1] if path.startswith("/") else ""
    return _BY_FOLDER.get(folder, native.REFUSALS.error_body)
