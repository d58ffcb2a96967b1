"""`/docs`: Swagger UI from this machine. The framework's own page loads its scripts from a CDN. A closed network cannot
reach that, and the scripts would run in the page where a person types a key.

The scripts come from the wheel `fastapi-offline`; none of its code is used.
"""

# Without `from __future__ import annotations`: FastAPI must find the class Request in the signature, not its name.
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import FileResponse, RedirectResponse, Response

if TYPE_CHECKING:
    from embedding_service.service import Service

_NOTHING_FROM_ELSEWHERE = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"
)


def _folder() -> Path:
    spec = find_spec("fastapi_offline")
    assert spec is not None  # noqa: S101 - the distribution depends on it
    assert spec.origin is not None  # noqa: S101 - for the type checker: it is a package with files
    return Path(spec.origin).parent / "static"


_FOLDER = _folder()


def docs(_: "Service", request: Request) -> Response:
    # the page names what it loads relative to its own path, so with a slash at the end it would look a folder too deep
    if request.scope["raw_path"].endswith(b"/"):
        return RedirectResponse("../docs")
    page = get_swagger_ui_html(
        openapi_url="openapi.json",  # relative: a proxy may serve the gateway under a path of its own
        title=request.app.title,
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="data:,",
        swagger_ui_parameters={"validatorUrl": None},
    )
    page.headers["content-security-policy"] = _NOTHING_FROM_ELSEWHERE
    return page


def script(_: "Service") -> Response:
    return FileResponse(_FOLDER / "swagger-ui-bundle.js", media_type="text/javascript")


def style(_: "Service") -> Response:
    return FileResponse(_FOLDER / "swagger-ui.css", media_type="text/css")
