"""HTTP to HAProxy: the one place of the HTTP client.

HAProxy tells on each reply which replica sent it, and sends a request that names one there if that one is up.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import aiohttp

from embedding_service.errors import Problem, Unavailable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

CONNECT_S = 1.0  # HAProxy is a host away at most; its name too must be found by then, however mute name servers are
CONNECT_TRIES_S = 0.8  # a reload of HAProxy refuses connections for a moment; nothing has been sent, so repeat freely
CONNECT_PAUSE_S = 0.1
UNSENT_HEADER = "x-connection-retries"
"""On a 503 of HAProxy's own: other than 0, if the replicas it tried refused the connection. Those that have just died,
or are just starting, count as up until the next checks, and several at once can take all of its tries."""
REPLICA_HEADER = "x-replica"
"""On a reply of a replica: its name. On a request: the replica that it is for, another if that one is down."""
KEEP_ALIVE_S = 15.0  # shorter than HAProxy's client keep-alive, so that we are the one to close


class Broken(Exception):
    """A sent request came to nothing, but another replica may answer it; `problem` if there is no other try.

    `replica` is who answered, but with nothing that could be used; None if nobody did. `in_doubt`: the fault may be the
    work's as well.
    """

    def __init__(self, problem: Problem, replica: str | None = None, *, in_doubt: bool = False) -> None:
        super().__init__(problem.message)
        self.problem = problem
        self.replica = replica
        self.in_doubt = in_doubt


class Balancer:
    """HTTP to HAProxy. As a context manager it owns the connections."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,  # bounded by the lanes' calls
                keepalive_timeout=KEEP_ALIVE_S,
                use_dns_cache=False,  # a container that was made anew has another address
            ),
            auto_decompress=False,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def request(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body of one exchange. Raises `Unavailable`, or `Broken` if the request had been sent.

        Connections that fail, here or behind HAProxy, are tried again for a moment: nothing has been sent on them.
        """
        assert self._session is not None, "used outside its context"  # noqa: S101 - for the type checker and misuse
        timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_S)  # the caller bounds the whole
        give_up_at = time.monotonic() + CONNECT_TRIES_S
        while True:
            try:
                async with self._session.request(
                    method, self._url + path, data=body, headers=headers, timeout=timeout, allow_redirects=False
                ) as reply:
                    try:
                        content = await reply.read()
                    except (aiohttp.ClientError, OSError) as cut:
                        problem = Unavailable(f"a reply was cut short: {type(cut).__name__}", retry_after_s=1)
                        raise Broken(problem, reply.headers.get(REPLICA_HEADER)) from None
                    if not _unsent(reply.status, reply.headers) or time.monotonic() > give_up_at:
                        return reply.status, reply.headers, content
            except aiohttp.ClientConnectorError as refused:
                if time.monotonic() > give_up_at:
                    raise Unavailable(
                        f"the balancer refuses connections: {refused.os_error.strerror}", retry_after_s=1
                    ) from None
            except aiohttp.ConnectionTimeoutError:
                raise Unavailable("the balancer does not accept connections", retry_after_s=1) from None
            except (aiohttp.ClientError, OSError) as broken:
                raise Broken(Unavailable(f"the connection broke: {type(broken).__name__}", retry_after_s=1)) from None
            await asyncio.sleep(CONNECT_PAUSE_S)


def _unsent(status: int, headers: Mapping[str, str]) -> bool:
    """HAProxy found nobody to send the request to, though it takes some replicas to be up."""
    return status == 503 and headers.get(UNSENT_HEADER, "0") != "0"  # noqa: PLR2004 - the status is the word for it
