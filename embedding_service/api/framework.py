"""Tells FastAPI of the table of routes: the operations that it calls, and all that its OpenAPI document shows."""

from __future__ import annotations

import json
from functools import cache, partial
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Body

from embedding_service.api.auth import Access
from embedding_service.api.dialects import native, openai
from embedding_service.api.routes import ROUTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi import FastAPI

    from embedding_service.api.routes import Route
    from embedding_service.service import Service

_REFUSED_BY_ACCESS = {Access.ALWAYS: (), Access.OPERATOR: (401,), Access.KEY: (401,), Access.ADMIN: (401, 403)}
_FRAMEWORKS = "HTTPValidationError"

# FastAPI makes the names of two schemas from their modules, since both classes have the same name. The document keeps
# the names it was first published with: clients that were generated from it hold them.
_PUBLISHED_NAMES = {
    native.REFUSALS.reply: "ml_base__native__ErrorReply",
    openai.REFUSALS.reply: "embedding_service__api__openai__ErrorReply",
}


def add_routes(app: FastAPI, service: Service) -> None:
    """Adds every route to `app`. Those that `edge.Edge` answers itself are added for the document and for 405 only."""
    for route in ROUTES:
        if not (route.direct or route.operation):
            continue
        for path in route.paths:
            app.add_api_route(
                path,
                _described(route) if route.operation is None else _bound(route.operation, service),
                methods=[route.method],
                name=route.name or getattr(route.operation, "__name__", ""),
                summary=route.summary,
                description=route.description,
                tags=list(route.tags),
                response_model=route.reply,
                status_code=route.status,
                responses=_responses(route),
                include_in_schema=route.documented,
            )
    written = app.openapi
    app.openapi = cache(lambda: _published(written()))  # type: ignore[method-assign]  # as FastAPI advises


def _bound(operation: Callable[..., Any], service: Service) -> Callable[..., Any]:
    bound = partial(operation, service)
    bound.__doc__ = ""  # else the document would show that of `partial`
    return bound


def _described(route: Route) -> Callable[..., Any]:
    """Returns a function with the signature that FastAPI documents. It is never called."""

    def answered_before_the_framework(body: object) -> None:
        raise NotImplementedError

    examples: Any = {name: {"value": body} for name, body in route.examples.items()}
    answered_before_the_framework.__annotations__ = {
        "body": Annotated[route.request, Body(openapi_examples=examples)],
        "return": None,
    }
    return answered_before_the_framework


def _responses(route: Route) -> dict[int | str, dict[str, Any]]:
    if route.dialects:
        refused = tuple(status for dialect in route.dialects for status in dialect.refusals.statuses)
    elif route.direct:
        refused = route.refusals.statuses
    else:
        refused = _REFUSED_BY_ACCESS[route.access]
    responses: dict[int | str, dict[str, Any]] = {
        status: {"model": route.refusals.reply} for status in (*refused, *route.refused)
    }
    if route.unready:
        responses[503] = {"description": "`reasons` tell why not."}
    return responses


def _published(document: dict[str, Any]) -> dict[str, Any]:
    """Takes out the refusal that FastAPI adds to each route with a body or a parameter, which is never sent here, and
    gives schemas their published names.
    """
    for route in (route for path in document["paths"].values() for route in path.values()):
        refusal = route["responses"].get("422")
        if refusal is not None and _FRAMEWORKS in str(refusal):
            del route["responses"]["422"]
    for name in (_FRAMEWORKS, "ValidationError"):
        document["components"]["schemas"].pop(name, None)
    text = json.dumps(document)
    for schema, name in _PUBLISHED_NAMES.items():
        text = text.replace(f"{schema.__module__}.{schema.__qualname__}".replace(".", "__"), name)
    renamed: dict[str, Any] = json.loads(text)
    return renamed
