"""Converts a transformer to int8 by nncf's post-training quantisation, calibrated on the texts of this package."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ml_base.backends import UnsupportedModelError

if TYPE_CHECKING:
    import openvino

    from ml_base.backends.torch import TorchBackend

CALIBRATION = Path(__file__).with_name("calibration.txt")
"""The file of texts as people embed them, one on each line: questions, sentences, paragraphs, code, several languages,
single words, and none at all, which is the text that loses most if it is missing (a cosine of 0.95 instead of 0.99)."""


class Quantizer:
    """Quantises a graph for the activations of `backend`'s model on the calibration texts, which takes ten seconds."""

    def __init__(self, backend: TorchBackend) -> None:
        self._backend = backend
        text = CALIBRATION.read_text(encoding="utf-8")
        self._texts = text.splitlines()
        self.identity = b"int8" + hashlib.sha256(text.encode()).digest()

    def __call__(self, graph: openvino.Model) -> openvino.Model:
        """Raises `UnsupportedModelError` without nncf."""
        try:
            import nncf  # noqa: PLC0415 - in an extra, and needed only once for each model
        except ImportError:
            raise UnsupportedModelError("int8 needs nncf: install the extra int8") from None
        logging.getLogger("nncf").setLevel(logging.WARNING)
        with contextlib.redirect_stdout(io.StringIO()):  # hides progress bars, which do not belong in a log
            quantized: openvino.Model = nncf.quantize(
                graph,
                nncf.Dataset(self._texts, self._backend.arrays),
                model_type=nncf.ModelType.TRANSFORMER,
                # activations of a transformer lie to both sides of zero, but not evenly
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(self._texts),
            )
        return quantized
