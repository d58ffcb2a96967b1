"""Who may call what: a rule over paths and keys, applied before any route. Pure; `routes.py` says it of each path."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

from embedding_common.keys import bearer
from embedding_service.errors import Forbidden, Unauthorized

if TYPE_CHECKING:
    from collections.abc import Mapping

    from embedding_common.keys import Keys


class Access(enum.Enum):
    """Who may call a route, once keys are set."""

    ALWAYS = enum.auto()
    """Everyone. A container engine restarts a process that refuses this call; the reply tells only that it runs."""
    OPERATOR = enum.auto()
    """Everyone, unless the operator has closed these routes. Probes, scrapers and browsers read them; those have no way
    to send a key, and none of the replies tells of a text."""
    KEY = enum.auto()
    """Callers with an API key or an admin key."""
    ADMIN = enum.auto()
    """Callers with an admin key; if there are no admin keys, callers with an API key."""


_READING = ("GET", "HEAD")


class Gate:
    """Lets a request pass, or raises. An admin key opens all that an API key opens; only it opens the admin paths.

    Without `admin_keys` an API key is enough for admin paths. Without either, everything is open, and a key that a
    client sends is ignored: many clients cannot be told to send none.

    `open_paths` need no key to be read. `admin_prefixes` are the beginnings of admin paths: the router may take a path
    with odd characters at its end for the one without, so a longer path needs an admin key too. For the same reason all
    paths that are not in `open_paths` are closed, known or not.
    """

    def __init__(
        self, *, keys: Keys, admin_keys: Keys, open_paths: frozenset[str], admin_prefixes: tuple[str, ...]
    ) -> None:
        self._keys = keys
        self._admin_keys = admin_keys
        self._open = open_paths
        self._admin_prefixes = admin_prefixes

    def __repr__(self) -> str:
        return f"<Gate {len(self._keys)} keys, {len(self._admin_keys)} admin keys>"

    @property
    def locks(self) -> bool:
        """Whether there is any key to check."""
        return bool(self._keys or self._admin_keys)

    def admit(self, scope: Mapping[str, Any]) -> None:
        """Raises `Unauthorized`, `Forbidden`."""
        path: str = scope["path"]
        admin = bool(self._admin_keys) and path.startswith(self._admin_prefixes)
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
