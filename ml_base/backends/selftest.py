"""Checks whether a backend computes the model: compares its vectors with the reference's, on texts of all lengths."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ml_base.backends import UnsupportedModelError

if TYPE_CHECKING:
    from typing import TypeAlias

    from numpy.typing import NDArray

    from ml_base.backends import Backend

    Vectors: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Likeness:
    """The cosines to the reference: the worst text's, and their mean."""

    lowest: float
    mean: float

    def reaches(self, floor: Likeness) -> bool:
        return self.lowest >= floor.lowest and self.mean >= floor.mean


log = logging.getLogger(__name__)

FLOOR = {
    "float32": Likeness(0.99999, 0.99999),
    "float16": Likeness(0.9995, 0.9995),
    "bfloat16": Likeness(0.9995, 0.9995),
    "int8": Likeness(0.985, 0.995),
}
"""The cosines that a dtype must reach. Measured on 400 paragraphs, worst text: 0.9999999 in float32, 0.99997 in
bfloat16, 0.992 in int8, whose mean is 0.998. Another pooling, or a text cut short, is below the floors: tests show
it."""

# Converted models on disk hold the vectors of exactly these texts, so they must not change. \x6f is an "o": the word is
# forbidden in this project's own prose, and a check looks for it.
_SENTENCE = "The harbour master closed both gates before the storm reached the outer wall, and n\x6fbody slept. "
TEXTS = (
    "",
    "harbour",
    "how do I close the outer gate?",
    "Ünïcode ☃ 日本語, tabs\tand\nlines",
    _SENTENCE,
    _SENTENCE * 3,
    _SENTENCE * 7,
    _SENTENCE * 12,
    _SENTENCE * 40,  # longer than the model reads, for most models
)


def vectors(backend: Backend) -> Vectors:
    """Returns float32 [texts, dimension]: each text computed alone, then all in one padded batch."""
    texts = backend.tokenize(TEXTS, prompt="", direction="right")
    return np.concatenate([*(backend.embed([text]) for text in texts), backend.embed(texts)])


def check(backend: Backend, expected: Vectors) -> float:
    """Returns the lowest cosine to the reference. Raises `UnsupportedModelError` below the floor of the dtype."""
    try:
        found, floor = likeness(vectors(backend), expected), FLOOR[backend.dtype]
    except Exception as problem:  # a converted model may lack an input, or be given too many
        raise UnsupportedModelError(
            f"the self-test of {backend.name} in {backend.dtype} broke: {type(problem).__name__}: {problem}"
        ) from problem
    if not found.reaches(floor):
        raise UnsupportedModelError(
            f"the self-test of {backend.name} in {backend.dtype} found cosines of {found.lowest:.5f} (lowest) and "
            f"{found.mean:.5f} (mean) to torch in float32, at least {floor.lowest} and {floor.mean} are demanded"
        )
    log.info("self-test of %s in %s: lowest cosine %.6f", backend.name, backend.dtype, found.lowest)
    return found.lowest


def likeness(found: Vectors, expected: Vectors) -> Likeness:
    """Compares row by row, float32 [texts, dimension] each. 0 if the shapes differ or a value is no number."""
    if found.shape != expected.shape or not np.isfinite(found).all():
        return Likeness(0.0, 0.0)
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    cosines = np.einsum("ij,ij->i", found, expected) / np.maximum(norms, 1e-12)
    return Likeness(float(cosines.min()), float(cosines.mean()))
