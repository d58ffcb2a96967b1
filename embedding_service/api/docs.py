"""`/docs`: Swagger UI from this machine. The framework's own page loads its scripts from a CDN, which a closed network
lacks, and which would then run in the page where somebody types a key.

The scripts are those that the wheel `fastapi-offline` carries; of its code, nothing is used.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import FileResponse, RedirectResponse, Response

_NOTHING_FROM_ELSEWHERE = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"
)


def router(*, title: str) -> APIRouter:
    """The page, and the two files that it loads."""
    docs = APIRouter(include_in_schema=False)
    page = get_swagger_ui_html(
        openapi_url="openapi.json",  # relative: a proxy may serve the gateway under a path of its own
        title=title,
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="data:,",
        swagger_ui_parameters={"validatorUrl": None},
    )
    page.headers["content-security-policy"] = _NOTHING_FROM_ELSEWHERE
    folder = _folder()

    @docs.get("/docs")
    def show(request: Request) -> Response:
        # what the page loads is named relative to it, and would be looked for a folder too deep
        return RedirectResponse("../docs") if request.scope["raw_path"].endswith(b"/") else page

    @docs.get("/docs/swagger-ui-bundle.js")
    def script() -> Response:
        return FileResponse(folder / "swagger-ui-bundle.js", media_type="text/javascript")

    @docs.get("/docs/swagger-ui.css")
    def style() -> Response:
        return FileResponse(folder / "swagger-ui.css", media_type="text/css")

    return docs


def _folder() -> Path:
    spec = find_spec("fastapi_offline")
    assert spec is not None  # noqa: S101 - the distribution depends on it
    assert spec.origin is not None  # noqa: S101 - for the type checker: it is a package with files
    return Path(spec.origin).parent / "static"
