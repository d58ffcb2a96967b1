"""What all dialects share: a request's texts and options in, encoded vectors and headers out. Knows no wire shape."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal, Protocol, TypeVar

from pydantic import Field

from embedding_common import native
from embedding_common.contract import FINGERPRINT_HEADER, PRIORITY_HEADER, TIMEOUT_HEADER, choose_lane, parse_timeout_s
from embedding_common.http import edge
from embedding_service.core.query import Ask
from embedding_service.core.singleflight import NEVER
from embedding_service.errors import InvalidRequest, Overloaded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import Receive, Scope, Send

    from embedding_common.contract import ModelCard
    from embedding_service.api.render import Renderer
    from embedding_service.core.catalog import Catalog
    from embedding_service.core.embedder import Embedder
    from embedding_service.core.query import Answer

LARGE_BODY_BYTES = 1 << 20
"""Smaller ones are bounded by how many callers there are, and are never turned away for the room of large ones."""
LARGE_BODIES_BYTES = 512 << 20
"""Of large bodies that a gateway holds at once, with their texts twice to three times that: sixteen of the largest, in
a container of 2 GB. Without it some seventy callers end its processes, and everybody's requests with them."""
_HELD = "large_body_bytes"  # in a scope's state

TTL_HEADER = "x-cache-ttl"  # seconds; for clients that can add a header but no field
MAX_TTL_S = 10 * 365 * 86_400

_FINGERPRINT = FINGERPRINT_HEADER.encode()
_PRIORITY = PRIORITY_HEADER.encode()
_TIMEOUT = TIMEOUT_HEADER.encode()
_TTL = TTL_HEADER.encode()

# what is embedded -> names that models give to the prompt for it; "passage" is what some clients call a document
_PROMPTS_FOR = {
    "query": ("query", "search_query"),
    "document": ("document", "passage", "search_document"),
    "passage": ("passage", "document", "search_document"),
}

R = TypeVar("R", bound="Options")
R_contra = TypeVar("R_contra", bound="Options", contravariant=True)


class Options(native.EmbedOptions):
    """How to embed, in every dialect. `null` means absent; unknown fields are ignored."""

    input_type: Annotated[
        Literal["query", "document", "passage"] | None,
        Field(description="Takes the model's prompt for it, if it has one; `prompt_name` goes first."),
    ] = None

    def prompt(self, card: ModelCard) -> str | None:
        """The name of the prompt that this request wants of this model."""
        if self.prompt_name is not None or self.input_type is None:
            return self.prompt_name
        return next((name for name in _PROMPTS_FOR[self.input_type] if name in card.prompts), None)


@dataclass(slots=True)
class Exchange:
    """One request whose body has arrived. `started` is on the performance counter, before its first byte was read."""

    scope: Scope
    receive: Receive
    send: Send
    started: float
    body: bytes


class Shape(Protocol[R_contra]):
    """How a dialect writes a reply. Pure."""

    def items(self, rows: list[bytes], start: int) -> list[bytes]:
        """Encoded vectors of the texts from `start` on, as items of the reply's list."""

    def frame(self, chunks: list[bytes], answer: Answer, options: R_contra, took_s: float) -> list[bytes]:
        """The whole body in parts, around chunks of one or more items."""


class Serving:
    """Takes a request from its texts to its reply, within the limits of this gateway."""

    def __init__(
        self,
        *,
        embedder: Embedder,
        catalog: Catalog,
        renderer: Renderer,
        max_texts: int,
        max_text_bytes: int,
        max_body_bytes: int,
        large_bodies_bytes: int,
        auto_truncate: bool,
    ) -> None:
        self._embedder = embedder
        self._catalog = catalog
        self._renderer = renderer
        self.max_texts = max_texts
        self.max_text_bytes = max_text_bytes
        self._max_body_bytes = max_body_bytes
        self._auto_truncate = auto_truncate
        self._large_bodies_bytes = large_bodies_bytes
        self._large_bytes = 0

    async def receive(self, scope: Scope, receive: Receive, send: Send) -> Exchange:
        """Reads the body, whatever its content type. Raises `BodyTooLarge`, `ClientGone`, `Overloaded`.

        To be followed by `let_go`, however it ends.
        """
        started = time.perf_counter()
        grown = partial(self._grown, scope)
        body = await edge.read_body(scope, receive, limit_bytes=self._max_body_bytes, grown=grown)
        return Exchange(scope, receive, send, started, body)

    def let_go(self, scope: Scope) -> None:
        """The request is over, and its body with it."""
        self._large_bytes -= scope["state"].pop(_HELD, 0)

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

    async def reply(self, exchange: Exchange, texts: Sequence[str], options: R, shape: Shape[R]) -> None:
        """Embeds and writes. Raises `Problem`, before anything has been written."""
        parsed = time.perf_counter()
        answer = await self._embedder.embed(await self._ask(exchange, texts, options))
        if options.truncate is False or (options.truncate is None and not self._auto_truncate):
            _refuse_truncated(answer)
        embedded = time.perf_counter()
        chunks: list[bytes] = []
        for rows in self._renderer.rows(
            answer.entries,
            dimensions=options.dimensions,
            normalize=options.normalize is not False,
            encoding_format=options.encoding_format,
        ):
            items = shape.items(rows, len(chunks) * native.ROWS_PER_CHUNK)
            if len(texts) <= native.ROWS_PER_CHUNK:
                chunks = items  # copied once, when the reply is put together
            else:
                chunks.append(b",".join(items))
                await asyncio.sleep(0)  # others' cached answers go out between the chunks of a large one
        ended = time.perf_counter()
        parts = shape.frame(chunks, answer, options, ended - exchange.started)
        headers = [
            (_FINGERPRINT, answer.card.fingerprint.encode()),
            (b"x-cache", b"hit=%d;miss=%d" % (answer.cached, len(texts) - answer.cached)),
            (b"x-tokens", b"%d" % answer.tokens),
            (b"x-truncated", b"%d" % answer.truncated),
            (
                b"server-timing",
                b"receive;dur=%.3f, embed;dur=%.3f, encode;dur=%.3f"
                % ((parsed - exchange.started) * 1e3, (embedded - parsed) * 1e3, (ended - embedded) * 1e3),
            ),
        ]
        await edge.send_bytes(exchange.send, 200, parts, headers=headers)

    async def _ask(self, exchange: Exchange, texts: Sequence[str], options: Options) -> Ask:
        headers = dict(exchange.scope["headers"])
        timeout_s = parse_timeout_s(_text(headers.get(_TIMEOUT)))
        deadline = NEVER if timeout_s is None else time.monotonic() + timeout_s
        prompt_name = options.prompt_name
        if options.dimensions is not None or options.input_type is not None:
            card = await self._catalog.learn(options.model_id, deadline=deadline)
            native.check_dimensions(options.dimensions, card)
            prompt_name = options.prompt(card)
        ttl_s = options.cache_ttl_seconds
        return Ask(
            texts=texts,
            lane=choose_lane(_text(headers.get(_PRIORITY)), len(texts)),
            request_id=exchange.scope["state"]["request_id"],
            model_id=options.model_id,
            prompt_name=prompt_name,
            direction=options.truncation_direction or "right",
            deadline=deadline,
            ttl_s=ttl_s if ttl_s is not None else _parse_ttl_s(_text(headers.get(_TTL))),
            bypass=b"no-cache" in headers.get(b"cache-control", b""),
            caller_gone=partial(edge.disconnected, exchange.receive),
        )


def _text(header: bytes | None) -> str | None:
    return None if header is None else header.decode("latin-1")


def _parse_ttl_s(header: str | None) -> int | None:
    if header is None:
        return None
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
            raise native.refuse_truncated(index, entry.tokens, answer.card)
