"""The way of a request that embeds, in every dialect: read the body, parse, embed, render, write.

On the way of a cached text, only this module and `render.py` of the folder `api` run code.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from os.path import commonprefix
from typing import TYPE_CHECKING, TypeAlias

from embedding_common.contract import FINGERPRINT_HEADER, PRIORITY_HEADER, TIMEOUT_HEADER, choose_lane, parse_timeout_s
from embedding_common.encoding import ROWS_PER_CHUNK
from embedding_common.http import edge
from embedding_common.refusals import check_dimensions, refuse_truncated
from embedding_service.api.dialects.dialect import spoken_in
from embedding_service.core.query import Query
from embedding_service.core.singleflight import NEVER
from embedding_service.errors import InvalidRequest, Overloaded

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

    from starlette.types import Receive, Scope, Send

    from embedding_service.api.dialects.dialect import Dialect, Limits, Options
    from embedding_service.api.render import Renderer
    from embedding_service.cache.entry import Entry
    from embedding_service.core.catalog import Catalog
    from embedding_service.core.embedder import Embedder
    from embedding_service.core.query import Answer

    Endpoint: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
    Handler: TypeAlias = Callable[[bytes, Limits, str], Awaitable[bytes]]
    """Makes the JSON of a reply from a body, the limits and the request's id. Raises `Problem`."""

LARGE_BODY_BYTES = 1 << 20
"""Size from which a request body counts as large. The number of callers bounds what smaller bodies hold, so those are
never refused for lack of room."""
LARGE_BODIES_BYTES = 512 << 20
"""Total bytes of large request bodies that a gateway holds at once: sixteen of the largest. With their texts they take
twice to three times that, in a container of 2 GB. Without this limit about seventy callers end the gateway's processes,
and with them the requests of all others."""

REFUSALS = "refusals"
"""Key in a scope's state: the function that writes refusals in the dialect that the body speaks, once that is known."""
_HELD = "large_body_bytes"  # key in a scope's state: the bytes that this request holds of the room for large bodies

TTL_HEADER = "x-cache-ttl"  # seconds; for clients that can add a header but no field
MAX_TTL_S = 10 * 365 * 86_400

_FINGERPRINT = FINGERPRINT_HEADER.encode()
_PRIORITY = PRIORITY_HEADER.encode()
_TIMEOUT = TIMEOUT_HEADER.encode()
_TTL = TTL_HEADER.encode()


class Serving:
    """Takes each request from its body to its reply, within the limits of this gateway.

    `edition` is a name that replies may tell. `large_bodies_bytes` bounds what large request bodies hold at once.
    `auto_truncate` says whether a text over the model's limit is cut where a request does not say.
    """

    def __init__(
        self,
        *,
        embedder: Embedder,
        catalog: Catalog,
        renderer: Renderer,
        limits: Limits,
        max_body_bytes: int,
        large_bodies_bytes: int,
        auto_truncate: bool,
        edition: str,
    ) -> None:
        self._embedder = embedder
        self._catalog = catalog
        self._renderer = renderer
        self._limits = limits
        self._max_body_bytes = max_body_bytes
        self._large_bodies_bytes = large_bodies_bytes
        self._auto_truncate = auto_truncate
        self._edition = edition
        self._large_bytes = 0

    def embed_endpoint(self, dialects: Sequence[Dialect]) -> Endpoint:
        """Returns an ASGI app that embeds texts. If there are several dialects, the body tells which one it speaks."""
        others = [dialect.texts_field for dialect in dialects[1:]]
        # Begins each field of the other dialects. Within a JSON string the quote is escaped, so most bodies in the
        # first dialect lack it, and need not be parsed twice.
        mark = f'"{commonprefix(others)}'.encode() if others else None  # noqa: RUF071 - these are no file names
        return partial(self._embed, dialects, mark)

    def json_endpoint(self, name: str, handler: Handler) -> Endpoint:
        """Returns an ASGI app that answers with the JSON of `handler`; the header `server-timing` says `name`."""
        return partial(self._handle, name, handler)

    async def _embed(
        self, dialects: Sequence[Dialect], mark: bytes | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Raises `Problem` before any byte of the reply is written; `ClientGone`."""
        started = time.perf_counter()
        try:
            body = await self._read(scope, receive)
            dialect = dialects[0]
            if mark is not None and mark in body:
                dialect = spoken_in(body, dialects)
                scope["state"][REFUSALS] = dialect.refusals.error_body
            texts, options = dialect.parse(body, self._limits)
            if dialect.decode is not None and not isinstance(texts[0], str):
                texts = await dialect.decode(texts, self._limits)  # type: ignore[arg-type]  # token ids, if no strings
            await self._answer(dialect, texts, options, started, scope, receive, send)  # type: ignore[arg-type]  # strings
        finally:
            self._let_go(scope)

    async def _answer(
        self,
        dialect: Dialect,
        texts: Sequence[str],
        options: Options,
        started: float,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Embeds `texts` and writes the reply. `started` is on the performance counter, before the body was read."""
        parsed = time.perf_counter()
        answer = await self._embedder.embed(await self._query(scope, receive, texts, options))
        if options.truncate is False or (options.truncate is None and not self._auto_truncate):
            _refuse_truncated(answer)
        embedded = time.perf_counter()
        if len(texts) <= ROWS_PER_CHUNK:
            items = self._items(dialect, answer.entries, 0, options)  # copied once, when the reply is put together
        else:
            items = await self._chunks(dialect, answer.entries, options)
        ended = time.perf_counter()
        parts = dialect.write(
            items,
            texts=texts,
            model=answer.card.id,
            dimension=options.dimensions or answer.card.dimension,
            tokens=answer.tokens,
            cached=answer.cached,
            took_s=ended - started,
            edition=self._edition,
        )
        headers = [
            (_FINGERPRINT, answer.card.fingerprint.encode()),
            (b"x-cache", b"hit=%d;miss=%d" % (answer.cached, len(texts) - answer.cached)),
            (b"x-tokens", b"%d" % answer.tokens),
            (b"x-truncated", b"%d" % answer.truncated),
            (
                b"server-timing",
                b"receive;dur=%.3f, embed;dur=%.3f, encode;dur=%.3f"
                % ((parsed - started) * 1e3, (embedded - parsed) * 1e3, (ended - embedded) * 1e3),
            ),
        ]
        await edge.send_bytes(send, 200, parts, headers=headers)

    async def _handle(self, name: str, handler: Handler, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        try:
            body = await self._read(scope, receive)
            reply = await handler(body, self._limits, scope["state"]["request_id"])
            timing = b"%b;dur=%.3f" % (name.encode(), (time.perf_counter() - started) * 1e3)
            await edge.send_bytes(send, 200, [reply], headers=[(b"server-timing", timing)])
        finally:
            self._let_go(scope)

    # --- bodies ---

    def _read(self, scope: Scope, receive: Receive) -> Coroutine[None, None, bytes]:
        """Reads the body, whatever its content type. Raises `BodyTooLarge`, `ClientGone`, `Overloaded`.

        `_let_go` must follow, however the request ends.
        """
        grown = partial(self._grown, scope)
        return edge.read_body(scope, receive, limit_bytes=self._max_body_bytes, grown=grown)

    def _grown(self, scope: Scope, size: int) -> None:
        if size <= LARGE_BODY_BYTES:
            return
        more = size - scope["state"].get(_HELD, 0)
        if self._large_bytes + more > self._large_bodies_bytes:
            raise Overloaded(
                f"body: large ones may hold {self._large_bodies_bytes} bytes at once, and do",
                field="body",
                limit=self._large_bodies_bytes,
                value=size,
                retry_after_s=1,
            )
        self._large_bytes += more
        scope["state"][_HELD] = size

    def _let_go(self, scope: Scope) -> None:
        self._large_bytes -= scope["state"].pop(_HELD, 0)

    # --- from texts to encoded vectors ---

    async def _query(self, scope: Scope, receive: Receive, texts: Sequence[str], options: Options) -> Query:
        headers = dict(scope["headers"])
        timeout, priority, ttl = headers.get(_TIMEOUT), headers.get(_PRIORITY), headers.get(_TTL)
        timeout_s = None if timeout is None else parse_timeout_s(timeout.decode("latin-1"))
        deadline = NEVER if timeout_s is None else time.monotonic() + timeout_s
        prompt_name = options.prompt_name
        if options.dimensions is not None or options.input_type is not None:
            card = await self._catalog.learn(options.model_id, deadline=deadline)
            check_dimensions(options.dimensions, card)
            prompt_name = options.prompt(card)
        lane = choose_lane(None if priority is None else priority.decode("latin-1"), len(texts))
        ttl_s = options.cache_ttl_seconds
        if ttl_s is None and ttl is not None:
            ttl_s = _parse_ttl_s(ttl.decode("latin-1"))
        return Query(
            texts=texts,
            lane=lane,
            request_id=scope["state"]["request_id"],
            model_id=options.model_id,
            prompt_name=prompt_name,
            direction=options.truncation_direction or "right",
            deadline=deadline,
            ttl_s=ttl_s,
            bypass=b"no-cache" in headers.get(b"cache-control", b""),
            caller_gone=partial(edge.disconnected, receive),
        )

    async def _chunks(self, dialect: Dialect, entries: Sequence[Entry], options: Options) -> list[bytes]:
        """Returns the items of a long list, joined to chunks of `ROWS_PER_CHUNK`."""
        chunks: list[bytes] = []
        for start in range(0, len(entries), ROWS_PER_CHUNK):
            items = self._items(dialect, entries[start : start + ROWS_PER_CHUNK], start, options)
            chunks.append(b",".join(items))
            await asyncio.sleep(0)  # cached answers for others go out between the chunks of a large one
        return chunks

    def _items(self, dialect: Dialect, entries: Sequence[Entry], start: int, options: Options) -> list[bytes]:
        """Returns the items of the reply's list for the texts from place `start` on."""
        vectors = self._renderer.rows(
            entries,
            dimensions=options.dimensions,
            normalize=options.normalize is not False,
            encoding_format=options.encoding_format,
        )
        return vectors if dialect.write_items is None else dialect.write_items(vectors, start)


def _parse_ttl_s(header: str) -> int:
    if not (header.isascii() and header.isdigit() and int(header[:20]) <= MAX_TTL_S):
        raise InvalidRequest(
            f"{TTL_HEADER}: must be a whole number of seconds from 0 to {MAX_TTL_S}, got {header[:40]!r}",
            field=TTL_HEADER,
            limit=MAX_TTL_S,
            value=header[:40],
        )
    return int(header)


def _refuse_truncated(answer: Answer) -> None:
    for index, entry in enumerate(answer.entries):
        if entry.truncated:
            raise refuse_truncated(index, entry.tokens, answer.card)
