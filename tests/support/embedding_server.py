"""Real HTTP servers on loopback: the base of each fake system, and the service that `embedding-warm` calls."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import numpy as np

from embedding_service.tools.warm import __main__ as warm_cache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    import pytest
    from numpy.typing import NDArray

DIMENSION = 6
Answer = tuple[int, dict[str, Any], dict[str, str]]


class JsonHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet a reply: two would meet delayed acknowledgements

    def request_json(self) -> dict[str, Any]:
        request: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["content-length"])))
        return request

    def answer(self, status: int, body: bytes | dict[str, Any], headers: Mapping[str, str] | None = None) -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            for name, value in {**(headers or {}), "content-length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
            self.wfile.flush()

    def log_message(self, *_: Any) -> None: ...


class LoopbackServer(ThreadingHTTPServer):
    request_queue_size = 64  # of the default 5 the sixth connection at once waits a second

    def __init__(self, handler: type[JsonHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield
        self.shutdown()
        thread.join()
        self.server_close()


def vector_of(text: str) -> NDArray[np.float32]:
    digest = hashlib.sha256(text.encode()).digest()
    return np.frombuffer(digest[:DIMENSION], np.uint8).astype(np.float32) / np.float32(7)


class FakeService:
    """Remembers what it saw; `misbehave(request)` may answer in its place."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.priorities: set[str | None] = set()
        self.authorization: str | None = None
        self.misbehave: Callable[[dict[str, Any]], Answer | None] = lambda _: None
        self.model = "fake"
        self._known: set[str] = set()
        self._lock = threading.Lock()
        fake = self

        class Handler(JsonHandler):
            def do_GET(self) -> None:
                self.answer(200, {"status": "healthy"})

            def do_POST(self) -> None:
                request = self.request_json()
                with fake._lock:
                    fake.priorities.add(self.headers["x-priority"])
                    fake.authorization = self.headers["authorization"]
                self.answer(*fake.embed(request))

        self.server = LoopbackServer(Handler)
        self.url = self.server.url

    def embed(self, request: dict[str, Any]) -> Answer:
        with self._lock:
            self.requests.append(request)
            if (answer := self.misbehave(request)) is not None:
                return answer
            texts = request["texts"]
            cached = sum(text in self._known for text in texts)
            self._known.update(texts)
        vectors = [vector_of(text)[: request.get("dimensions")].tolist() for text in texts]
        return 200, {"embeddings": vectors, "dimension": DIMENSION, "model": self.model, "cached_count": cached}, {}

    @property
    def texts_sent(self) -> list[str]:
        return [text for request in self.requests for text in request["texts"]]


def refusal(status: int, message: str, field: str | None = None, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, {"error": message, "field": field}, named


def warm(service: FakeService, file: Path | str, *options: str) -> int:
    return warm_cache.main([str(file), "--url", service.url, *options])


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads(capsys.readouterr().out)
    return summary
