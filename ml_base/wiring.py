"""Builds the parts of a replica from its settings; the server and `prepare` load their models in the same way."""

from __future__ import annotations

import gc
import logging
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ml_base.app import Replica
from ml_base.backends import LoadOptions
from ml_base.machine import threads
from ml_base.metrics import Metrics
from ml_base.models import loading
from ml_base.models.models import Models, ServedModel
from ml_base.models.warmup import Bounds

if TYPE_CHECKING:
    from collections.abc import Callable

    from ml_base.config import Settings
    from ml_base.machine.threads import Threads
    from ml_base.models.loading import LoadedModel, Source

log = logging.getLogger(__name__)


def resolve_all(settings: Settings) -> list[Source]:
    """Returns where the models that may be served are, the default model first. Raises `ModelUnavailableError`."""
    resolve = partial(loading.resolve, baked_dir=_baked_dir(settings))
    found = {source.id: source for source in map(resolve, settings.model_names)}
    if len(found) < len(settings.model_names):
        raise loading.ModelUnavailableError(f"ML_BASE_MODELS: two of {settings.models} have the same name")
    return list(found.values())


def _baked_dir(settings: Settings) -> Path | None:
    return Path(settings.baked_dir) if settings.baked_dir else None


def set_up(settings: Settings, sources: list[Source]) -> Threads:
    """Sets the variables that the numeric libraries read when they are imported; after that it is too late."""
    chosen = threads.choose(wanted=settings.wanted_threads, replicas=settings.replicas_per_host)
    log.info("threads=%d (%s)", chosen.count, chosen.reason)
    os.environ.update(threads.environment(chosen.count))
    if all(source.local for source in sources):
        os.environ["HF_HUB_OFFLINE"] = "1"  # otherwise the model of a folder is looked up on the hub, with retries
    return chosen


def loader(settings: Settings, chosen: Threads) -> Callable[[Source], LoadedModel]:
    """Returns the function that loads one model, which takes seconds and may raise `ModelUnavailableError`."""
    options = LoadOptions(
        local=True,
        threads=chosen.count,
        cache_dir=Path(settings.cache_dir).expanduser(),
        baked_dir=_baked_dir(settings),
        dtype=settings.dtype,
        device=settings.device,
    )
    bounds = Bounds(
        max_texts=settings.max_batch_texts,
        max_tokens=settings.max_batch_tokens,
        max_s=settings.max_slice_ms / 1000,
        sharing=chosen.per_core,
    )
    return partial(loading.load, backend=settings.backend, options=options, bounds=bounds)


def build(settings: Settings) -> Replica:
    """Returns a replica with its models in memory that does not serve yet.

    That takes seconds. Raises `ModelUnavailableError`.
    """
    sources = resolve_all(settings)
    chosen = set_up(settings, sources)
    load = loader(settings, chosen)
    gc.disable()  # importing torch makes a million objects that stay; collecting among them takes a fifth of the start
    first = sources if settings.load_at_start == "all" else sources[:1]
    preloaded = {source.id: load(source) for source in first}
    gc.freeze()  # no later collection walks over them either: that would hold the event loop for 0.1 s
    gc.enable()
    metrics = Metrics()
    models = Models(
        sources,
        preloaded=preloaded,
        load=load,
        serve=partial(
            ServedModel,
            max_batch_texts=settings.max_batch_texts,
            patience_s=settings.batch_timeout_ms / 1000,
            max_queue_texts=settings.max_queue_texts,
            bulk_share=settings.bulk_share,
            observer=metrics,
        ),
        observer=metrics,
        unload_after_s=settings.model_unload_timeout_s,
        nice=settings.nice,
    )
    return Replica(settings, models, metrics, chosen)
