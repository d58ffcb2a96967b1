"""The settings of a replica: read once from the environment, checked together, frozen. Units are in the names."""

from __future__ import annotations

import socket
from typing import Annotated, ClassVar, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import SettingsConfigDict

from embedding_common.keys import Keys, parse_keys
from embedding_common.settings import EnvironmentSettings


class Settings(EnvironmentSettings):
    """Every variable of a replica, its default, and why that is the default."""

    model_config = SettingsConfigDict(case_sensitive=True)

    SECRETS: ClassVar[tuple[str, ...]] = ("ADMIN_API_KEYS",)

    host: Annotated[str, Field(alias="ML_BASE_HOST")] = "0.0.0.0"
    """The address to listen on. By default the replica listens on all interfaces, as a container must."""
    port: Annotated[int, Field(alias="ML_BASE_PORT", ge=1, le=65535)] = 8887
    """The port to listen on."""
    instance_id: Annotated[
        str,
        Field(alias="INSTANCE_ID", pattern=r"^[\x21-\x7e]{1,128}$", json_schema_extra={"default": "the host's name"}),
    ] = Field(default_factory=socket.gethostname)
    """The name of this replica in health answers and in the log. The default is never read from `HOSTNAME`: Docker sets
    that variable, and a shell may have exported another host's name."""
    models: Annotated[str, Field(alias="ML_BASE_MODELS")] = "all-MiniLM-L6-v2"
    """The models that may be served, comma separated: names, folders, or ids of the model hub. The first is the default
    model: it is loaded before anything is served, and stays loaded."""
    load_at_start: Annotated[Literal["default", "all"], Field(alias="ML_BASE_LOAD_AT_START")] = "default"
    """Which models are loaded before the replica serves. With `default` the others are loaded when they are first asked
    for, so that a replica is up in seconds however many there are."""
    model_unload_timeout_s: Annotated[float, Field(alias="ML_BASE_MODEL_UNLOAD_TIMEOUT", ge=0)] = 300
    """The time, in seconds, without a request after which a model is unloaded; 0 stands for never. The default model
    stays."""
    backend: Annotated[Literal["auto", "torch", "openvino"], Field(alias="ML_BASE_BACKEND")] = "auto"
    """What computes the transformer. `auto` takes OpenVINO on a CPU if it computes the same vectors as torch there, and
    else torch."""
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16", "int8"], Field(alias="ML_BASE_DTYPE")] = "auto"
    """The number format that the transformer is computed in. `auto` takes bfloat16 where the CPU multiplies it
    natively, float16 on CUDA, and else float32."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Field(alias="ML_BASE_DEVICE")] = "auto"
    """The device that computes. `auto` takes a CUDA device if there is one."""
    cache_dir: Annotated[str, Field(alias="ML_BASE_CACHE_DIR", min_length=1)] = "~/.cache/embedding-service"
    """The folder of converted models, by digest. In containers it is a volume, so that a new replica need not convert
    again."""
    baked_dir: Annotated[str, Field(alias="ML_BASE_BAKED_DIR")] = ""
    """The folder of converted models, and of models from the hub, that an image brings. It is searched first, and never
    written to."""

    max_batch_texts: Annotated[int, Field(alias="ML_BASE_MAX_BATCH_SIZE", ge=1, le=4096)] = 64
    """The most texts in one batch."""
    max_batch_tokens: Annotated[int, Field(alias="ML_BASE_MAX_BATCH_TOKENS", ge=0, le=1 << 20)] = 0
    """The most tokens in one batch, padding included. The default, 0 or `auto`, measures the fewest that reach 90 % of
    the best throughput."""
    max_slice_ms: Annotated[float, Field(alias="ML_BASE_MAX_SLICE_MS", gt=0, le=60_000)] = 60
    """The longest time, in milliseconds, that one batch may run if its size is measured. A request that arrives
    while a batch runs waits for its end."""
    batch_timeout_ms: Annotated[float, Field(alias="ML_BASE_BATCH_TIMEOUT_MS", ge=0, le=60_000)] = 50
    """The longest time, in milliseconds, that a request may be passed over for texts of better-fitting length. No
    request waits for a timer: an idle model starts at once."""
    bulk_share: Annotated[float, Field(alias="ML_BASE_BULK_SHARE", ge=0, le=1)] = 0.2
    """The share of batches that bulk work gets while interactive texts wait too, from 0 to 1."""
    max_queue_texts: Annotated[int, Field(alias="ML_BASE_MAX_QUEUE_TEXTS", ge=1, le=1 << 20)] = 2048
    """The most texts that wait in the queue of one lane. The default is half a minute of short paragraphs on one core:
    a caller that waited behind more would have given up."""

    threads: Annotated[int, Field(alias="ML_BASE_THREADS", ge=0, le=1024)] = 0
    """The number of threads that compute. The default, 0 or `auto`, shares the cores of this process out over the
    replicas of the host."""
    replicas_per_host: Annotated[int, Field(alias="ML_BASE_REPLICAS_PER_HOST", ge=1, le=1024)] = 1
    """The number of replicas that share the cores of this host."""

    nice: Annotated[int, Field(alias="ML_BASE_NICE", ge=0, le=19)] = 5
    """How far inference steps back for others that want the cores, as a nice value. Those are the event loops of
    replica and gateway, which are done in a millisecond, and a replica that starts again. It costs nothing while the
    others want nothing."""

    drain_s: Annotated[float, Field(alias="ML_BASE_DRAIN_S", ge=0, le=600)] = 3
    """How long, in seconds, the replica serves on after SIGTERM while `/health` answers 503. HAProxy asks every second
    and needs three failures, but the first one is enough for it to close idle connections."""
    finish_s: Annotated[int, Field(alias="ML_BASE_FINISH_S", ge=1, le=600)] = 6
    """The longest wait, in seconds, for requests in hand after draining. Together with `ML_BASE_DRAIN_S` the default
    stays below the 10 s that Docker gives before SIGKILL."""
    stuck_s: Annotated[float, Field(alias="ML_BASE_STUCK_S", gt=0, le=3600)] = 15
    """The time, in seconds, that one batch may run before `/health` answers 503. A batch takes 0.1 s, and one of the
    longest texts beside two busy neighbours a second or two: nothing healthy takes as long as the default."""

    stuck_exit_s: Annotated[float, Field(alias="ML_BASE_STUCK_EXIT_S", ge=0, le=86_400)] = 120
    """The time, in seconds, that one batch may run before the process ends itself; 0 stands for never. A container
    engine restarts a process that has ended, but not one that is unhealthy."""

    max_texts: Annotated[int, Field(alias="MAX_TEXTS", ge=1, le=1 << 20)] = 8192
    """The most texts in one request."""
    max_text_bytes: Annotated[int, Field(alias="MAX_TEXT_BYTES", ge=1, le=1 << 30)] = 1 << 20
    """The most bytes of one text."""
    max_body_bytes: Annotated[int, Field(alias="MAX_BODY_BYTES", ge=1, le=1 << 30)] = 32 << 20
    """The most bytes of one request body."""

    admin_api_keys: Annotated[SecretStr | None, Field(alias="ADMIN_API_KEYS", exclude=True)] = None
    """The keys for loading and unloading models, comma separated. Without them these need no key. `/info` does not show
    them."""
    admin_api_keys_file: Annotated[str | None, Field(alias="ADMIN_API_KEYS_FILE")] = None
    """The file that holds the admin keys, in place of `ADMIN_API_KEYS`."""

    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], Field(alias="LOG_LEVEL")] = "INFO"
    """The lowest level of messages in the log, in upper or lower case."""
    edition: Annotated[str, Field(alias="SUTRA_EDITION", max_length=64)] = "simple"
    """The name of the edition that replies and `/info` repeat. It limits nothing."""

    @field_validator("threads", "max_batch_tokens", mode="before")
    @classmethod
    def _auto_is_zero(cls, value: object) -> object:
        return 0 if isinstance(value, str) and value.lower() == "auto" else value

    @field_validator("models")
    @classmethod
    def _name_some(cls, value: str) -> str:
        if not _names(value):
            raise ValueError("needs the name of a model")
        return value

    @property
    def admin_keys(self) -> Keys:
        """The admin keys; empty if nothing is locked."""
        return Keys(() if self.admin_api_keys is None else parse_keys(self.admin_api_keys.get_secret_value()))

    @property
    def wanted_threads(self) -> int | None:
        """The number of threads that the operator has set, or None for auto."""
        return self.threads or None

    @property
    def model_names(self) -> list[str]:
        """The names of the models, the default model first."""
        return _names(self.models)


def _names(models: str) -> list[str]:
    return [name.strip() for name in models.split(",") if name.strip()]
