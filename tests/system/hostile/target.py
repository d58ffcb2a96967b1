"""The gateway as the process that operators run, before a replica of no cost; and what hostile callers do to it."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

import httpx

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROOT = Path(__file__).resolve().parents[3]
LOOPBACK = "127.0.0.1"
START_WITHIN_S = 30.0
ANSWER_WITHIN_S = 5.0
SILENCE_S = 0.4
"""Of a gateway that waits for the rest of a request; whole ones are answered well before, on a busy machine too."""
PAUSE_S = 0.03  # after which nothing more of a reply is expected

STATUS_LINE = re.compile(rb"^HTTP/1\.1 (\d{3}) ", re.MULTILINE)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        return int(taken.getsockname()[1])


class Target:
    """Two processes; a context manager that ends them."""

    def __init__(self, folder: Path, env: Mapping[str, str] | None = None) -> None:
        self.port, self.replica_port = free_port(), free_port()
        self.url = f"http://{LOOPBACK}:{self.port}"
        self._env = {
            "PYTHONPATH": str(ROOT),
            "PORT": str(self.port),
            "HOST": LOOPBACK,
            "ML_BASE_URL": f"http://{LOOPBACK}:{self.replica_port}",
            "REDIS_ENABLED": "false",
            "DRAIN_S": "0",
            **(env or {}),
        }
        self._log = folder / "gateway.log"
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        log = self._stack.enter_context(self._log.open("wb"))
        replica = [sys.executable, str(ROOT / "tests/system/hostile/replica.py"), str(self.replica_port)]
        for command in (replica, [sys.executable, "-m", "embedding_service"]):
            self._process = subprocess.Popen(command, env=self._env, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
            self._stack.callback(self._process.wait)
            self._stack.callback(self._process.terminate)
        self._wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _wait_ready(self) -> None:
        until = time.monotonic() + START_WITHIN_S
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            assert time.monotonic() < until, self.log()
            time.sleep(0.05)

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def memory_bytes(self) -> int:
        """Resident, of the gateway."""
        parent = self._process.pid
        [worker] = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        pages = Path(f"/proc/{worker}/statm").read_text().split()[1]
        return int(pages) * 4096

    def answers(self) -> bool:
        """Whether an uncached text is answered, and at once."""
        reply = httpx.post(f"{self.url}/embed", json={"texts": [str(time.monotonic())]}, timeout=ANSWER_WITHIN_S)
        return reply.status_code == 200

    async def send(self, raw: bytes) -> bytes:
        """What comes back for these bytes. A connection that stays silent is closed from here."""
        reader, writer = await asyncio.open_connection(LOOPBACK, self.port)
        try:
            writer.write(raw)
            reply = b""
            with contextlib.suppress(OSError):
                async with asyncio.timeout(ANSWER_WITHIN_S):
                    reply = await self._read(reader)
            return reply
        finally:
            writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> bytes:
        """Until the connection ends, or nothing more comes after a reply or instead of one."""
        reply = b""
        while True:
            try:
                part = await asyncio.wait_for(reader.read(1 << 16), PAUSE_S if reply else SILENCE_S)
            except TimeoutError:
                return reply
            if not part:
                return reply
            reply += part

    def send_all(self, requests: Sequence[bytes]) -> list[bytes]:
        """The replies to requests that are sent at once."""

        async def all_at_once() -> list[bytes]:
            return await asyncio.gather(*map(self.send, requests))

        return asyncio.run(all_at_once())


def statuses(reply: bytes) -> list[int]:
    return [int(status) for status in STATUS_LINE.findall(reply)]


def request(path: str, body: bytes, *headers: bytes, method: str = "POST") -> bytes:
    """A well-formed request around any body."""
    head = [f"{method} {path} HTTP/1.1".encode(), b"host: gateway", b"content-length: %d" % len(body), *headers]
    return b"\r\n".join((*head, b"", body))
