"""A model small enough to convert in a moment: two layers of random weights under the default model's tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ml_base.models.loading import resolve

if TYPE_CHECKING:
    from pathlib import Path

DIMENSION = 32


def save_tiny(folder: Path, *, seed: int = 0) -> Path:
    """Writes a sentence-transformers model, the same each time for the same seed."""
    # seconds, which tests without a real model do not need
    import torch  # noqa: PLC0415
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415
    from transformers import BertConfig, BertModel  # noqa: PLC0415

    model: Any = SentenceTransformer(resolve("all-MiniLM-L6-v2").location, device="cpu", local_files_only=True)
    config = BertConfig(
        vocab_size=len(model.tokenizer),
        hidden_size=DIMENSION,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model[0].model = BertModel(config)
    model[1].embedding_dimension = DIMENSION
    model.max_seq_length = 64
    model.save(str(folder), create_model_card=False)
    return folder
