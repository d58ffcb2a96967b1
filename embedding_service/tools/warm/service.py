"""Sends batches to `POST /embed`: what a refusal means, what is tried again, and which text is the cause."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import re
import time
from http import HTTPStatus
from typing import TYPE_CHECKING, NoReturn

import aiohttp
import orjson

from embedding_service.tools.client.http import BrokenReply, EmbedReply, json_object, open_session, read_embed_reply
from embedding_service.tools.client.options import Misuse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from embedding_service.tools.warm.input import Batch, Entry
    from embedding_service.tools.warm.options import Settings

CONNECT_S = 10.0
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.25, 15.0
MAX_TRIES_OF_BROKEN = (
    3  # of a batch that the service breaks on: more tries would only delay the search for the text that is the cause
)


class Stopped(Exception):
    """The run cannot go on now. The same command resumes it."""


class _Again(Exception):
    """One try failed, and another may succeed. If `broken`, the service broke on it, so a text may be the cause."""

    def __init__(self, reason: str, *, retry_after_s: float | None = None, broken: bool = False) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s
        self.broken = broken


class _Rejected(Exception):
    """The service refuses this list of texts. `index` is that of the text it named, None if it named none."""

    def __init__(self, reason: str, index: int | None = None) -> None:
        super().__init__(reason)
        self.index = index


@contextlib.asynccontextmanager
async def open_service(settings: Settings) -> AsyncIterator[Service]:
    """Opens a session to the service and asks its health once.

    Raises `Misuse` if nothing answers: a wrong URL is reported at once, not after the whole patience.
    """
    timeout = aiohttp.ClientTimeout(total=settings.timeout_s, sock_connect=CONNECT_S)
    async with open_session(
        concurrency=settings.concurrency, timeout=timeout, api_key=settings.api_key, priority=settings.priority
    ) as session:
        try:
            async with session.get(f"{settings.url}/health", timeout=aiohttp.ClientTimeout(total=CONNECT_S)):
                pass
        except (TimeoutError, aiohttp.ClientError):
            raise Misuse(f"nothing answers at {settings.url}: is the service up? (--url names another)") from None
        yield Service(session, settings)


class Service:
    """Fills entries with vectors, or with the reason why they have none. It repeats what may succeed later."""

    def __init__(self, session: aiohttp.ClientSession, settings: Settings) -> None:
        self._session = session
        self._url = f"{settings.url}/embed"
        self._fields = settings.request_fields()
        self._patience_s = settings.patience_s
        self._keep_vectors = settings.out is not None
        self._seats = asyncio.Semaphore(settings.concurrency)

    async def fill(self, batch: Batch) -> Batch:
        """Returns the same batch after its request. Raises `Stopped` or `Misuse`."""
        async with self._seats:
            await self._fill(batch, [entry for entry in batch.entries if entry.error is None])
        return batch

    async def _fill(self, batch: Batch, entries: list[Entry]) -> None:
        """Leaves out a text that the service names; halves a list that it refuses until the text at fault is alone."""
        while entries:
            try:
                reply = await self._post([entry.text for entry in entries])
            except _Rejected as rejected:
                if len(entries) > 1 and rejected.index is None:
                    half = len(entries) // 2
                    await self._fill(batch, entries[:half])
                    entries = entries[half:]
                    continue
                entries.pop(rejected.index or 0).error = str(rejected)
            else:
                self._keep(batch, entries, reply)
                return

    def _keep(self, batch: Batch, entries: list[Entry], reply: EmbedReply) -> None:
        batch.cached += reply.cached
        batch.model = reply.model
        if self._keep_vectors:
            for entry, vector in zip(entries, reply.vectors, strict=True):
                entry.vector = vector

    async def _post(self, texts: list[str]) -> EmbedReply:
        body = orjson.dumps({"texts": texts} | self._fields)
        give_up_at_s = math.inf
        tries = 0
        while True:
            try:
                return await self._try(body, len(texts))
            except _Again as again:
                tries += 1
                if again.broken and tries >= MAX_TRIES_OF_BROKEN:
                    raise _Rejected(str(again)) from None
                wait_s = backoff_s(tries) if again.retry_after_s is None else again.retry_after_s
                give_up_at_s = min(give_up_at_s, time.monotonic() + self._patience_s)
                if time.monotonic() + wait_s > give_up_at_s:
                    raise Stopped(f"no answer within the patience of {self._patience_s:g} s: {again}") from None
            await asyncio.sleep(wait_s)

    async def _try(self, body: bytes, texts: int) -> EmbedReply:
        try:
            async with self._session.post(self._url, data=body) as response:
                reply = await response.read()
        except TimeoutError:
            raise _Again("no answer in time") from None
        except aiohttp.ClientError as problem:
            raise _Again(f"{type(problem).__name__}: {problem}"[:200]) from None
        if response.status != HTTPStatus.OK:
            _refuse(response.status, reply, texts, response.headers.get("retry-after"))
        try:
            return read_embed_reply(reply, texts)
        except BrokenReply as broken:
            raise _Again(str(broken), broken=True) from None


def _refuse(status: int, body: bytes, texts: int, retry_after: str | None) -> NoReturn:
    """Raises what the tool does about a refusal: try again, leave out a text, or end."""
    fields = json_object(body)
    reason = f"status {status}: {fields.get('error', 'no reason given')}"[:300]
    if status in {408, 429, 502, 503, 504}:
        raise _Again(reason, retry_after_s=_whole_seconds(retry_after))
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        raise _Again(reason, broken=True)
    if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:  # half of the list may fit
        raise _Rejected(reason)
    named = re.fullmatch(r"texts\[([0-9]+)\]", str(fields.get("field")))
    if named is None or int(named[1]) >= texts:
        raise Misuse(f"the service refuses the request, {reason}")
    raise _Rejected(reason, int(named[1]))


def _whole_seconds(header: str | None) -> float | None:
    """Returns Retry-After in seconds. Its other form, a date, is ignored, and the backoff applies."""
    return float(header) if header is not None and header.isdecimal() else None


def backoff_s(tries: int) -> float:
    """Returns the pause before the next try.

    It doubles with each try, with jitter so that the batches of a run do not come back together.
    """
    longest_s = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(tries - 1, 10))
    return longest_s * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
