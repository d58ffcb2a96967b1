"""The measuring processes of model_server.py: each runs one thing, alone, and prints its figures as JSON.

encode                       SentenceTransformer.encode in float32 on all cores: what everything is compared with
backend DTYPE                our backend in this process, one thread and all cores, in batches as a replica cuts them
http URL KIND SECONDS        KIND bulk, query, burst (16 queries at once) or beside (one query beside bulk)
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ml_base.backends import Backend, Tokenized
    from ml_base.models.loading import LoadedModel

MODEL = "all-MiniLM-L6-v2"
CORPUS = Path(__file__).with_name("corpus.txt")
TEXTS = 128  # of each mix in process
REPEATS = 3  # in process
QUERIES = 30
BULK_CLIENTS = 8
TEXTS_IN_CALL = 32
BURST = 16
THINK_S = 0.05  # between two queries of one who types


def mixes() -> dict[str, list[str]]:
    """`TEXTS` distinct texts each, of like length within a mix: about 14 tokens, 66 and 240."""
    paragraphs = CORPUS.read_text(encoding="utf-8").splitlines()
    chooser = random.Random(7)  # noqa: S311 - the same texts in every run
    numbered = [f"{number}. {chooser.choice(paragraphs)}" for number in range(TEXTS)]
    long = [" ".join(chooser.sample(paragraphs, 4)).split() for _ in range(TEXTS)]
    return {
        "12 words": [" ".join(text.split()[:12]) for text in numbered],
        "paragraphs": numbered,
        "240 tokens": [f"{number}. " + " ".join(words[:185]) for number, words in enumerate(long)],
    }


def queries() -> Iterator[str]:
    """Short questions without end, no two alike."""
    words = CORPUS.read_text(encoding="utf-8").split()
    chooser = random.Random()  # noqa: S311 - no cache has seen one
    for number in itertools.count():
        yield f"{' '.join(chooser.sample(words, 8))} {number}"


def fastest(work: Callable[[], object]) -> float:
    """Median of `REPEATS`, in seconds, after one run that does not count."""
    work()
    return statistics.median(_seconds(work) for _ in range(REPEATS))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


# --- in process ---


def encode() -> dict[str, Any]:
    """The reference, as its users call it; saves the vectors that the backends are compared with."""
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415 - only this process needs it

    from ml_base.models.loading import resolve  # noqa: PLC0415

    model = SentenceTransformer(resolve(MODEL).location, device="cpu")
    figures: dict[str, Any] = {"tokens": {}, "tokens_per_s": {}}
    for name, texts in mixes().items():
        tokens = sum(len(ids) for ids in model.tokenizer(texts, truncation=True, max_length=256)["input_ids"])
        figures["tokens"][name] = tokens
        figures["tokens_per_s"][name] = tokens / fastest(functools.partial(model.encode, texts))
    asked = list(itertools.islice(queries(), QUERIES))
    took = [_seconds(functools.partial(model.encode, [query])) for query in asked]
    figures["query_p50_ms"] = statistics.median(took) * 1000
    figures["one_at_a_time_per_s"] = len(took) / sum(took)
    return figures


def backend(dtype: str) -> dict[str, Any]:
    """Our backend without a server: throughput in batches as a replica cuts them, cosine to float32 torch."""
    cores = len(os.sched_getaffinity(0))
    figures: dict[str, Any] = {"dtype": dtype}
    for threads in dict.fromkeys((1, cores)):
        loaded = _load(dtype, threads)
        figures["dtype"], figures["self_test"] = loaded.card.dtype, loaded.backend.self_test
        figures[f"threads_{threads}"] = {name: _tokens_per_s([loaded], texts) for name, texts in mixes().items()} | {
            "slice_tokens": loaded.batch_tokens
        }
        if threads == 1:
            asked = loaded.backend.tokenize(list(itertools.islice(queries(), QUERIES)), prompt="", direction="right")
            took = [_seconds(functools.partial(loaded.backend.embed, [one])) for one in asked]
            figures["query_p50_ms"] = statistics.median(took) * 1000
            pair = [loaded, _load(dtype, 1)]
            figures["two_streams"] = {name: _tokens_per_s(pair, texts) for name, texts in mixes().items()}
            figures.update(_likeness(loaded.backend))
    return figures


def _load(dtype: str, threads: int) -> LoadedModel:
    from ml_base.backends import LoadOptions  # noqa: PLC0415
    from ml_base.models import loading  # noqa: PLC0415
    from ml_base.models.warmup import Bounds  # noqa: PLC0415

    options = LoadOptions(local=True, threads=threads, cache_dir=_cache_dir(), dtype=dtype)
    return loading.load(loading.resolve(MODEL), backend="auto", options=options, bounds=Bounds(max_texts=64))


def _cache_dir() -> Path:
    return Path(os.environ.get("ML_BASE_CACHE_DIR", tempfile.gettempdir()))


def _tokens_per_s(models: Sequence[LoadedModel], texts: Sequence[str]) -> float:
    """All batches of `texts`, tokenizing included, on one thread for each model."""
    with ThreadPoolExecutor(len(models)) as streams:

        def run() -> list[int]:
            parts = [texts[place :: len(models)] for place in range(len(models))]
            return list(streams.map(_compute, models, parts))

        return sum(run()) / fastest(run)


def _compute(model: LoadedModel, texts: Sequence[str]) -> int:
    from ml_base.batching.batches import BatchLimits, pick  # noqa: PLC0415

    left = [_Waiting(piece, model.backend.grid.length(piece.length)) for piece in _tokenized(model.backend, texts)]
    limits = BatchLimits(max_texts=64, max_tokens=model.batch_tokens, patience_s=9.0, grid=model.backend.grid)
    tokens = sum(one.piece.length for one in left)
    while left:
        taken = set(pick(left, now=0.0, limits=limits))
        model.backend.embed([left[place].piece for place in taken])
        left = [one for place, one in enumerate(left) if place not in taken]
    return tokens


@dataclass
class _Waiting:
    piece: Tokenized
    length: int
    passed_at: float = float("inf")


def _tokenized(backend: Backend, texts: Sequence[str]) -> list[Tokenized]:
    return backend.tokenize(texts, prompt="", direction="right")


def _likeness(backend: Backend) -> dict[str, float]:
    import numpy as np  # noqa: PLC0415
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415

    from ml_base.backends import selftest  # noqa: PLC0415
    from ml_base.models.loading import resolve  # noqa: PLC0415

    texts = [text for mix in mixes().values() for text in mix]
    expected = SentenceTransformer(resolve(MODEL).location, device="cpu").encode(texts)
    found = np.concatenate([backend.embed([piece]) for piece in _tokenized(backend, texts)])
    likeness = selftest.likeness(found, expected)
    return {"cosine_lowest": likeness.lowest, "cosine_mean": likeness.mean}


# --- over HTTP ---


@dataclass
class Load:
    """What several clients have had answered."""

    texts: int = 0
    took_s: list[float] = field(default_factory=list)


async def over_http(url: str, kind: str, seconds: float) -> dict[str, Any]:
    """Load of one kind for so long; texts/s count what was answered within that time."""
    import aiohttp  # noqa: PLC0415

    bulk, asked = Load(), Load()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        client = _Client(session, url)
        people = {"query": 1, "beside": 1, "burst": BURST, "bulk": 0}[kind]
        jobs = BULK_CLIENTS if kind in ("bulk", "beside") else 0
        think_s = 0.0 if kind == "burst" else THINK_S
        tasks = [asyncio.create_task(client.work(bulk, number)) for number in range(jobs)]
        tasks += [asyncio.create_task(client.ask(asked, think_s)) for _ in range(people)]
        await asyncio.sleep(min(2.0, seconds / 4))  # until the queues are as they will be
        bulk.texts, asked.texts, asked.took_s = 0, 0, []
        started = time.perf_counter()
        await asyncio.sleep(seconds)
        took_s = time.perf_counter() - started
        figures: dict[str, Any] = {"bulk_texts_per_s": bulk.texts / took_s, "queries_per_s": asked.texts / took_s}
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
    if asked.took_s:
        ordered = sorted(asked.took_s)
        figures["p50_ms"] = statistics.median(ordered) * 1000
        figures["p99_ms"] = ordered[int(len(ordered) * 0.99)] * 1000
        figures["max_ms"] = ordered[-1] * 1000
    return figures


class _Client:
    def __init__(self, session: Any, url: str) -> None:
        self._session = session
        self._url = url
        self._queries = queries()

    async def work(self, load: Load, number: int) -> None:
        """Paragraphs without pause, no text twice."""
        paragraphs = [text.split() for text in mixes()["paragraphs"]]
        chooser = random.Random()  # noqa: S311 - the same words in an order that no cache has seen
        for start in itertools.count(number, TEXTS_IN_CALL):
            words = [paragraphs[(start + place) % TEXTS] for place in range(TEXTS_IN_CALL)]
            texts = [" ".join(chooser.sample(text, len(text))) for text in words]
            await self._post(texts, "bulk")
            load.texts += TEXTS_IN_CALL

    async def ask(self, load: Load, think_s: float) -> None:
        while True:
            started = time.perf_counter()
            await self._post([next(self._queries)], "interactive")
            load.took_s.append(time.perf_counter() - started)
            load.texts += 1
            await asyncio.sleep(think_s)

    async def _post(self, texts: list[str], lane: str) -> None:
        body = json.dumps({"texts": texts, "encoding_format": "base64"}).encode()
        async with self._session.post(f"{self._url}/embed", data=body, headers={"x-priority": lane}) as reply:
            answer = await reply.read()
            if reply.status != 200 or answer.count(b'","') < len(texts) - 1:  # noqa: PLR2004
                raise RuntimeError(f"{reply.status}: {answer[:200]!r}")


def main() -> None:
    match sys.argv[1:]:
        case ["encode"]:
            figures = encode()
        case ["backend", dtype]:
            figures = backend(dtype)
        case ["http", url, kind, seconds]:
            figures = asyncio.run(over_http(url, kind, float(seconds)))
        case _:
            sys.exit(__doc__)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
