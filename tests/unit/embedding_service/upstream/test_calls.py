"""The gateway's end of the connections to HAProxy, over sockets whose other end says what the test wants."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from embedding_service.errors import Unavailable
from embedding_service.upstream.calls import REPLICA_HEADER, Balancer, Broken

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


async def answering(serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> asyncio.Server:
    return await asyncio.start_server(serve, "127.0.0.1", 0)


def url_of(server: asyncio.Server) -> str:
    return f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_a_refused_connection_is_tried_for_a_moment_and_then_told(unused_port: int) -> None:
    async with Balancer(f"http://127.0.0.1:{unused_port}") as balancer:
        started = asyncio.get_running_loop().time()
        with pytest.raises(Unavailable, match="refuses connections"):
            await balancer.request("POST", "/embed", b"", {})
    assert asyncio.get_running_loop().time() - started < 1.0, "an uncached text is refused within a second"


async def test_a_balancer_that_comes_back_in_time_is_reached(unused_port: int) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok")
        writer.close()

    async with Balancer(f"http://127.0.0.1:{unused_port}") as balancer:
        request = asyncio.create_task(balancer.request("GET", "/", None, {}))
        await asyncio.sleep(0.2)
        async with await asyncio.start_server(serve, "127.0.0.1", unused_port):
            status, _, body = await request
    assert (status, body) == (200, b"ok")


async def test_a_balancer_that_comes_back_at_another_address_is_reached_there(
    monkeypatch: pytest.MonkeyPatch, unused_port: int
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok")
        writer.close()

    real = socket.getaddrinfo
    async with Balancer(f"http://lb:{unused_port}") as balancer:
        for address in ("127.0.0.1", "127.0.0.2"):
            found = real(address, unused_port, type=socket.SOCK_STREAM)
            monkeypatch.setattr(socket, "getaddrinfo", lambda *_, found=found, **__: found)
            async with await asyncio.start_server(serve, address, unused_port):
                assert (await balancer.request("GET", "/", None, {}))[0] == 200


async def test_a_name_that_nobody_answers_for_is_given_up_within_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(5))
    async with Balancer("http://lb:8887") as balancer:
        started = asyncio.get_running_loop().time()
        with pytest.raises(Unavailable):
            await balancer.request("POST", "/embed", b"", {})
    over.set()
    assert asyncio.get_running_loop().time() - started < 2


@pytest.mark.parametrize("replies", [["503 +3", "503 +1", "200 0"], ["503 0"]])
async def test_only_what_reached_no_replica_is_asked_again(replies: list[str]) -> None:
    left = list(replies)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        status, retries = left.pop(0).split()
        head = f"HTTP/1.1 {status} X\r\nx-connection-retries: {retries}\r\ncontent-length: 0\r\nconnection: close"
        writer.write(f"{head}\r\n\r\n".encode())
        writer.close()

    async with await answering(serve) as server, Balancer(url_of(server)) as balancer:
        status, _, _ = await balancer.request("POST", "/embed", b"", {})
    assert (status, left) == (int(replies[-1].split()[0]), [])


async def test_a_connection_cut_after_the_request_is_told_as_broken() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.close()

    async with await answering(serve) as server, Balancer(url_of(server)) as balancer:
        with pytest.raises(Broken, match="the connection broke: ServerDisconnectedError") as broken:
            await balancer.request("POST", "/embed", b"", {})
    assert broken.value.replica is None


async def test_a_reply_that_is_cut_short_tells_whose_it_was() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 200 OK\r\n{REPLICA_HEADER}: ml-base-2\r\ncontent-length: 9\r\n\r\nhalf".encode())
        writer.close()

    async with await answering(serve) as server, Balancer(url_of(server)) as balancer:
        with pytest.raises(Broken, match="cut short") as broken:
            await balancer.request("POST", "/embed", b"", {})
    assert broken.value.replica == "ml-base-2"
