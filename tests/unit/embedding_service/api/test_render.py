from __future__ import annotations

import base64
from typing import Any

import numpy as np
import orjson
import pytest

from embedding_service.api.render import KEEP_ONE_IN, Renderer
from embedding_service.cache.entry import Entry

RNG = np.random.default_rng(7)


def entries(count: int, dimension: int = 8) -> list[Entry]:
    vectors = RNG.standard_normal((count, dimension)).astype(np.float32)
    return [Entry(vector.tobytes(), 3, truncated=False, expires_at=9) for vector in vectors]


def rendered(renderer: Renderer, of: list[Entry], **variant: Any) -> list[Any]:
    terms: dict[str, Any] = {"dimensions": None, "normalize": True, "encoding_format": None} | variant
    return [orjson.loads(row) for row in renderer.rows(of, **terms)]


def expected(of: list[Entry], *, dimensions: int | None = None, normalize: bool = True) -> Any:
    vectors = np.stack([np.frombuffer(entry.vector, np.float32) for entry in of])[:, :dimensions]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if normalize else vectors


@pytest.mark.parametrize(
    "variant", [{}, {"normalize": False}, {"dimensions": 3}, {"dimensions": 3, "normalize": False}]
)
def test_every_variant_is_right_whether_or_not_json_is_ready(variant: dict[str, Any]) -> None:
    renderer = Renderer(max_ready_bytes=10_000)
    some = entries(300)
    for _ in range(2 * KEEP_ONE_IN):
        rows = rendered(renderer, some, **variant)
    np.testing.assert_allclose(rows, expected(some, **variant), rtol=1e-6)


def test_base64_carries_the_same_numbers() -> None:
    some = entries(3)
    rows = rendered(Renderer(max_ready_bytes=0), some, encoding_format="base64")
    decoded = [np.frombuffer(base64.b64decode(row, validate=True), "<f4") for row in rows]
    np.testing.assert_allclose(decoded, expected(some), rtol=1e-6)


def test_ready_json_stays_within_its_bytes_and_is_taken_from_the_oldest() -> None:
    renderer = Renderer(max_ready_bytes=1000)
    some = entries(400)
    rendered(renderer, some)
    ready = [entry for entry in some if entry.ready is not None]
    assert 0 < renderer.ready_bytes <= 1000
    assert renderer.ready_bytes == sum(len(entry.ready or b"") for entry in ready)
    assert ready == some[KEEP_ONE_IN - 1 :: KEEP_ONE_IN][-len(ready) :]


def test_without_room_nothing_is_kept() -> None:
    renderer = Renderer(max_ready_bytes=0)
    some = entries(100)
    rendered(renderer, some)
    assert all(entry.ready is None for entry in some)


def test_numbers_are_always_written_with_a_point() -> None:
    zero = Entry(np.array([0, 1, 0], np.float32).tobytes(), 3, truncated=False, expires_at=9)
    for dimensions in (None, 3, 2):
        renderer = Renderer(max_ready_bytes=0)
        [row] = renderer.rows([zero], dimensions=dimensions, normalize=True, encoding_format=None)
        assert row == (b"[0.0,1.0]" if dimensions == 2 else b"[0.0,1.0,0.0]")
