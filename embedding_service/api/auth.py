"""Who may ask what: a rule over paths and keys, applied before any route. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from embedding_common.keys import bearer
from embedding_service.errors import Forbidden, Unauthorized

if TYPE_CHECKING:
    from collections.abc import Mapping

    from embedding_common.keys import Keys

ALWAYS_OPEN = frozenset({"/livez"})
"""Container engines restart whoever refuses to answer it, and it says nothing but that the process runs."""

OPERATOR_PATHS = frozenset(
    {
        "/",  # as GET: the health of a TEI server
        "/.well-known/live",
        "/.well-known/ready",
        "/docs",
        "/docs/swagger-ui-bundle.js",
        "/docs/swagger-ui.css",
        "/health",
        "/healthz",
        "/metrics",
        "/openapi.json",
        "/ping",
        "/readyz",
    }
)
"""What probes, scrapers and browsers read; they have no way to send a key, and none of it tells of a text."""

ADMIN_PREFIXES = ("/cache/clear",)
"""By prefix, and all others closed unless they are named: the router may take a path with odd characters at its end
for the one without."""

_READING = ("GET", "HEAD")


class Gate:
    """Lets a request pass, or raises. Any key opens what an API key opens; only an admin key what admins may do.

    Without `admin_keys` an API key is enough for admin paths. Without either, everything is open and whatever a client
    sends as its key is ignored: many cannot send none.
    """

    def __init__(self, *, keys: Keys, admin_keys: Keys, operator_paths_open: bool) -> None:
        self._keys = keys
        self._admin_keys = admin_keys
        self._open = ALWAYS_OPEN | OPERATOR_PATHS if operator_paths_open else ALWAYS_OPEN

    def __repr__(self) -> str:
        return f"<Gate {len(self._keys)} keys, {len(self._admin_keys)} admin keys>"

    @property
    def locks(self) -> bool:
        """Whether there is anything to check."""
        return bool(self._keys or self._admin_keys)

    def admit(self, scope: Mapping[str, Any]) -> None:
        """Raises `Unauthorized`, `Forbidden`."""
        path: str = scope["path"]
        admin = bool(self._admin_keys) and path.startswith(ADMIN_PREFIXES)
        if not admin and (not self._keys or (path in self._open and scope["method"] in _READING)):
            return
        key = bearer(scope)
        if key is None:
            raise Unauthorized("authorization: needs the header `Authorization: Bearer KEY`", field="authorization")
        if key in self._admin_keys or (not admin and key in self._keys):
            return
        if key in self._keys:
            raise Forbidden(f"authorization: {path[:200]} needs an admin key", field="authorization")
        raise Unauthorized("authorization: this key is not known here", field="authorization")
