"""The backend that runs sentence-transformers as it is, on torch: its tokenizer, transformer, pooling and prompts.

In float32 on the CPU it is the reference. Other dtypes and CUDA share all but where the tensors are, and pass the
self-test or are refused.
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
import sentence_transformers
import torch
import transformers
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from sentence_transformers import SentenceTransformer
from transformers.utils import logging as transformers_logging

from embedding_common.contract import TokenizedText
from ml_base.backends import Direction, LoadOptions, Tokenized, UnsupportedModelError, selftest
from ml_base.batching.batches import Grid

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

log = logging.getLogger(__name__)

HUB_TIMEOUT_S = 10.0

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FASTEST_DTYPE = {"cpu": "float32", "cuda": "float16"}  # the fastest that passes the self-test everywhere

_NO_LIMIT_TOKENS = 1_000_000
"""A limit from which on a tokenizer has none of its own: it then says 1e30 or so."""


def load(name_or_path: str, options: LoadOptions) -> TorchBackend:
    """Loads the model of a folder, or of the hub.

    Raises what sentence-transformers raises, or `UnsupportedModelError`.
    """
    device = find_device(options.device)
    dtype = options.dtype if options.dtype != "auto" else _FASTEST_DTYPE[device]
    if dtype not in _DTYPES:
        raise UnsupportedModelError(f"the torch backend computes in {', '.join(_DTYPES)}, not in {dtype}")
    model = open_model(name_or_path, options)
    if (device, dtype) == ("cpu", "float32"):
        return TorchBackend(model)
    reference = selftest.vectors(TorchBackend(model))
    backend = TorchBackend(model, dtype=dtype, device=device)
    backend.self_test = selftest.check(backend, reference)
    return backend


def find_device(wanted: str) -> str:
    """Returns `cpu` or `cuda`. Raises `UnsupportedModelError` for a device that is not there."""
    found = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" != found:
        raise UnsupportedModelError("ML_BASE_DEVICE is cuda, but torch finds no CUDA device here")
    return found if wanted == "auto" else wanted


def open_model(name_or_path: str, options: LoadOptions) -> SentenceTransformer:
    """Returns sentence-transformers' own object, on the CPU, with torch's threads set."""
    torch.set_num_threads(options.threads)
    if torch.get_num_interop_threads() != 1:  # one batch runs at a time, so nothing runs beside it
        torch.set_num_interop_threads(1)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers is partly typed
    local = options.local or not _hub_answers(name_or_path)
    return SentenceTransformer(name_or_path, device="cpu", local_files_only=local)


def _hub_answers(name: str) -> bool:
    """Asks the hub once, because loading from a hub that is out of reach tries each file six times: 90 s in all.

    What the answer says is left to the loading itself. Without an answer, what the cache holds is served.
    """
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
    except HfHubHTTPError:
        return True
    except Exception as silence:  # noqa: BLE001 - name resolution, sockets, TLS, offline mode: each library its own
        log.warning("the model hub does not answer (%s): trying the local cache", type(silence).__name__)
        return False
    return True


class TorchBackend:
    """Computes the vectors of `SentenceTransformer.encode`; tokenizing is separate from computing."""

    name = "torch"
    grid = Grid()  # nothing is compiled, so a new shape costs nothing
    self_test: float | None = None

    def __init__(self, model: SentenceTransformer, *, dtype: str = "float32", device: str = "cpu") -> None:
        self.dtype = dtype
        self.in_calling_thread = device == "cpu"
        self._device = torch.device(device)
        self._model = model.float().eval()
        self._tokenizer = _fast_tokenizer(model)
        self._raw = self._tokenizer.backend_tokenizer  # costs a third of the tokenizer itself for one short text
        self._take_tokenizer()
        self._tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True  # padding is separate on purpose
        self._excludes_prompt = any(not getattr(module, "include_prompt", True) for module in model.children())
        self._prompt_tokens: dict[str, int] = {}
        self.max_tokens = _max_tokens(model)
        self.pooling = _pooling(model)
        self.prompts: Mapping[str, str] = {name: prompt or "" for name, prompt in model.prompts.items()}
        self.default_prompt_name: str | None = model.default_prompt_name
        self._identity = self._digest()
        self._model.to(device=self._device, dtype=_DTYPES[dtype])

    def __repr__(self) -> str:
        return f"<TorchBackend {self.dtype} on {self._device} max_tokens={self.max_tokens}>"

    def _take_tokenizer(self) -> None:
        """Resets the tokenizer: whenever sentence-transformers uses it, its padding and its truncation stay set."""
        self._raw.no_padding()
        self._raw.no_truncation()

    def identity(self) -> bytes:
        return self._identity

    def _digest(self) -> bytes:
        """Returns a digest of what is in memory, so that a model from a wheel, a folder or the hub is the same model.

        Only the major version of the libraries counts: a major release may tokenize or pool in another way, while
        a patch moves a component by 1e-7 and must not empty every cache.
        """
        digest = hashlib.sha256()
        for key, tensor in self._model.state_dict().items():
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
        digest.update(
            orjson.dumps(_modules(self._model), option=orjson.OPT_SORT_KEYS | orjson.OPT_NON_STR_KEYS, default=str)
        )
        digest.update(hashlib.sha256(self._raw.to_str().encode()).digest())
        majors = [library.__version__.split(".")[0] for library in (sentence_transformers, transformers)]
        digest.update(f"{self.max_tokens} {majors}".encode())
        return digest.digest()

    def tokenize(self, texts: Sequence[str], *, prompt: str, direction: Direction) -> list[Tokenized]:
        prompt_tokens = self._measure_prompt(prompt) if prompt and self._excludes_prompt else 0
        prompted = [prompt + text for text in texts] if prompt else list(texts)
        encodings = self._raw.encode_batch(prompted)
        counts = [len(encoding) for encoding in encodings]
        long = [index for index, count in enumerate(counts) if count > self.max_tokens]
        for index, cut in zip(long, self._encode_cut([prompted[index] for index in long], direction), strict=True):
            encodings[index] = cut
        return [
            Tokenized(
                features=self._features(encoding),
                length=len(encoding),
                tokens=count,
                truncated=count > self.max_tokens,
                # a cut on the left takes the prompt, or part of it
                prompt_tokens=max(0, prompt_tokens - (count - len(encoding) if direction == "left" else 0)),
            )
            for encoding, count in zip(encodings, counts, strict=True)
        ]

    def arrays(self, text: str) -> dict[str, NDArray[np.int64]]:
        """Returns the transformer's inputs for one text, int64 [1, tokens] each."""
        [one] = self.tokenize([text], prompt="", direction="right")
        return {name: np.array([values], np.int64) for name, values in one.features.items()}

    def describe(self, texts: Sequence[str], *, prompt: str, add_special_tokens: bool) -> list[TokenizedText]:
        encodings = self._raw.encode_batch([prompt + text for text in texts], add_special_tokens=add_special_tokens)
        return [_described(encoding) for encoding in encodings]

    @torch.inference_mode()
    def embed(self, batch: Sequence[Tokenized]) -> NDArray[np.float32]:
        by_prompt: dict[int, list[int]] = defaultdict(list)
        for index, text in enumerate(batch):
            by_prompt[text.prompt_tokens].append(index)
        if len(by_prompt) == 1:
            return self._forward(batch)
        parts = [self._forward([batch[index] for index in group]) for group in by_prompt.values()]
        order = [index for group in by_prompt.values() for index in group]
        rows = np.empty((len(batch), parts[0].shape[1]), np.float32)
        rows[order] = np.concatenate(parts)
        return rows

    def _forward(self, batch: Sequence[Tokenized]) -> NDArray[np.float32]:
        names = batch[0].features
        rows = [*batch, *[batch[-1]] * (self.grid.rows(len(batch)) - len(batch))]
        padded = self._tokenizer.pad(
            {name: [text.features[name] for text in rows] for name in names},
            padding="max_length",
            max_length=self.grid.length(max([text.length for text in batch])),
            return_tensors="pt",
        )
        features: dict[str, Any] = {name: tensor.to(self._device) for name, tensor in padded.items()}
        if batch[0].prompt_tokens:
            features["prompt_length"] = batch[0].prompt_tokens
        vectors: NDArray[np.float32] = self._model(features)["sentence_embedding"].float().cpu().numpy()
        return vectors[: len(batch)]

    def _encode_cut(self, texts: list[str], direction: Direction) -> list[Any]:
        """Encodes texts again with truncation. Only the few that need it are encoded twice, and counts stay exact."""
        if not texts:
            return []
        self._raw.enable_truncation(self.max_tokens, direction=direction)
        try:
            return list(self._raw.encode_batch(texts))
        finally:
            self._raw.no_truncation()

    def _features(self, encoding: Any) -> dict[str, list[int]]:
        values = {"input_ids": encoding.ids, "attention_mask": encoding.attention_mask}
        if "token_type_ids" in self._tokenizer.model_input_names:
            values["token_type_ids"] = encoding.type_ids
        return values

    def _measure_prompt(self, prompt: str) -> int:
        """Returns the leading tokens of a prompt without the special token at its end, like sentence-transformers."""
        if prompt not in self._prompt_tokens:
            [encoding] = self._encode_cut([prompt], "right")
            ids = encoding.ids
            self._prompt_tokens[prompt] = len(ids) - (ids[-1] in self._tokenizer.all_special_ids)
        return self._prompt_tokens[prompt]


def _described(encoding: Any) -> TokenizedText:
    special = [bool(flag) for flag in encoding.special_tokens_mask]
    offsets = [None if flag else tuple(offset) for offset, flag in zip(encoding.offsets, special, strict=True)]
    return TokenizedText(encoding.ids, encoding.tokens, offsets, special)


def _fast_tokenizer(model: SentenceTransformer) -> Any:
    first = model[0]
    tokenizer = getattr(model, "tokenizer", None)
    if getattr(first, "auto_model", None) is None or not getattr(tokenizer, "is_fast", False):
        raise UnsupportedModelError(
            f"its first module is {type(first).__name__} with tokenizer {type(tokenizer).__name__}; "
            "only transformers with a fast tokenizer are served"
        )
    if "text" not in getattr(model, "modalities", ["text"]) or "message" in getattr(model, "modalities", []):
        raise UnsupportedModelError("it takes chat messages or no text; only plain text models are served")
    return tokenizer


def _max_tokens(model: SentenceTransformer) -> int:
    fixed = getattr(model[0], "processing_kwargs", {}).get("text", {}).get("max_length")
    config = _config(model)
    for limit in (fixed, model.max_seq_length, getattr(config, "max_position_embeddings", None)):
        if limit is not None and limit < _NO_LIMIT_TOKENS:
            return int(limit)
    raise UnsupportedModelError("neither its tokenizer nor its configuration says how long a text may be")


def _pooling(model: SentenceTransformer) -> str:
    modes = [getattr(module, "pooling_mode", ()) for module in model.children()]
    return "+".join(mode for one in modes for mode in ((one,) if isinstance(one, str) else one))


def _config(model: SentenceTransformer) -> Any:
    """Returns the transformer's configuration. torch types every attribute of a module as a tensor or a module."""
    transformer: Any = model[0]
    return transformer.auto_model.config


def _modules(model: SentenceTransformer) -> list[Any]:
    """Returns class and settings of each module: transformer, pooling, normalisation."""
    architecture = _config(model).to_dict()
    for irrelevant in (
        "_name_or_path",
        "transformers_version",
    ):  # they say where the model came from, not what it computes
        architecture.pop(irrelevant, None)
    return [architecture, *([type(module).__name__, _settings(module)] for module in model.children())]


def _settings(module: Any) -> Any:
    return module.get_config_dict() if hasattr(module, "get_config_dict") else None
