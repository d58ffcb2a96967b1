"""The environment of a replica, read once and checked. Every limit has its unit in its name."""

from __future__ import annotations

import socket
from collections.abc import Mapping  # noqa: TC003 - pydantic reads the annotation
from typing import Annotated, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from embedding_common.keys import Keys, parse_keys, secrets_from_files

SECRETS = ("ADMIN_API_KEYS",)
"""Each may be given as NAME_FILE instead. Never shown or logged."""


class ConfigError(Exception):
    """A variable has a value that cannot be used; the message is one line for the operator."""


class Settings(BaseSettings):
    """What a replica can be told. Names in capitals are the environment variables."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True, case_sensitive=True)

    host: Annotated[str, Field(validation_alias="ML_BASE_HOST")] = "0.0.0.0"
    port: Annotated[int, Field(validation_alias="ML_BASE_PORT", ge=1, le=65535)] = 8887
    # never HOSTNAME from the environment: Docker sets it, and a shell may have exported another host's
    instance_id: str = Field(
        validation_alias="INSTANCE_ID", pattern=r"^[\x21-\x7e]{1,128}$", default_factory=socket.gethostname
    )
    # comma separated: names, folders, hub ids. The first is the default: loaded before anything is served, and kept
    models: Annotated[str, Field(validation_alias="ML_BASE_MODELS")] = "all-MiniLM-L6-v2"
    # the others: when they are first asked for, so that a replica is up in seconds however many there are
    load_at_start: Annotated[Literal["default", "all"], Field(validation_alias="ML_BASE_LOAD_AT_START")] = "default"
    # of nobody asking for it; 0 stands for never
    model_unload_timeout_s: Annotated[float, Field(validation_alias="ML_BASE_MODEL_UNLOAD_TIMEOUT", ge=0)] = 300
    backend: Annotated[Literal["auto", "torch", "openvino"], Field(validation_alias="ML_BASE_BACKEND")] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "int8"], Field(validation_alias="ML_BASE_DTYPE")
    ] = "auto"
    device: Annotated[Literal["auto", "cpu", "cuda"], Field(validation_alias="ML_BASE_DEVICE")] = "auto"
    # converted models, by digest; a volume in containers, so that a new replica need not convert
    cache_dir: Annotated[str, Field(validation_alias="ML_BASE_CACHE_DIR", min_length=1)] = "~/.cache/embedding-service"
    # the same, and models from the hub, as an image brings them: looked into first, never written
    baked_dir: Annotated[str, Field(validation_alias="ML_BASE_BAKED_DIR")] = ""

    max_batch_texts: Annotated[int, Field(validation_alias="ML_BASE_MAX_BATCH_SIZE", ge=1, le=4096)] = 64
    # padded tokens of one slice; 0 stands for auto: the fewest that have 90 % of the best throughput
    max_batch_tokens: Annotated[int, Field(validation_alias="ML_BASE_MAX_BATCH_TOKENS", ge=0, le=1 << 20)] = 0
    # and that run no longer than this: whoever comes while a slice runs waits for it
    max_slice_ms: Annotated[float, Field(validation_alias="ML_BASE_MAX_SLICE_MS", gt=0, le=60_000)] = 60
    # the longest a request may be passed over for texts of better-fitting length; nobody ever waits for a timer
    batch_timeout_ms: Annotated[float, Field(validation_alias="ML_BASE_BATCH_TIMEOUT_MS", ge=0, le=60_000)] = 50
    bulk_share: Annotated[float, Field(validation_alias="ML_BASE_BULK_SHARE", ge=0, le=1)] = 0.2
    # half a minute of short paragraphs on one core: whoever waited behind more would have given up
    max_queue_texts: Annotated[int, Field(validation_alias="ML_BASE_MAX_QUEUE_TEXTS", ge=1, le=1 << 20)] = 2048

    # 0 stands for auto: the cores of this process shared out over the replicas
    threads: Annotated[int, Field(validation_alias="ML_BASE_THREADS", ge=0, le=1024)] = 0
    replicas_per_host: Annotated[int, Field(validation_alias="ML_BASE_REPLICAS_PER_HOST", ge=1, le=1024)] = 1

    # how far inference steps back for whatever else wants the cores: the event loops of replica and gateway, which are
    # done in a millisecond, and a replica that starts again. It loses nothing when nobody does
    nice: Annotated[int, Field(validation_alias="ML_BASE_NICE", ge=0, le=19)] = 5

    # HAProxy asks every second and needs three failures, but the first one is enough to close idle connections
    drain_s: Annotated[float, Field(validation_alias="ML_BASE_DRAIN_S", ge=0, le=600)] = 3
    # after draining, to finish what is in hand; together with the drain below the 10 s that Docker gives before SIGKILL
    finish_s: Annotated[int, Field(validation_alias="ML_BASE_FINISH_S", ge=1, le=600)] = 6
    # a slice takes 0.1 s, one longest text beside two busy neighbours a second or two: nothing healthy takes this long
    stuck_s: Annotated[float, Field(validation_alias="ML_BASE_STUCK_S", gt=0, le=3600)] = 15

    # then the process ends itself, since a container engine restarts what ended, not what is unhealthy; 0: never
    stuck_exit_s: Annotated[float, Field(validation_alias="ML_BASE_STUCK_EXIT_S", ge=0, le=86_400)] = 120

    max_texts: Annotated[int, Field(validation_alias="MAX_TEXTS", ge=1, le=1 << 20)] = 8192
    max_text_bytes: Annotated[int, Field(validation_alias="MAX_TEXT_BYTES", ge=1, le=1 << 30)] = 1 << 20
    max_body_bytes: Annotated[int, Field(validation_alias="MAX_BODY_BYTES", ge=1, le=1 << 30)] = 32 << 20

    # for loading and unloading models; excluded from what /info shows
    admin_api_keys: Annotated[SecretStr | None, Field(validation_alias="ADMIN_API_KEYS", exclude=True)] = None
    admin_api_keys_file: Annotated[str | None, Field(validation_alias="ADMIN_API_KEYS_FILE")] = None

    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], Field(validation_alias="LOG_LEVEL")
    ] = "INFO"
    edition: Annotated[str, Field(validation_alias="SUTRA_EDITION", max_length=64)] = "simple"

    @field_validator("threads", "max_batch_tokens", mode="before")
    @classmethod
    def _auto_is_zero(cls, value: object) -> object:
        return 0 if isinstance(value, str) and value.lower() == "auto" else value

    @field_validator("log_level", mode="before")
    @classmethod
    def _any_case(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    @field_validator("models")
    @classmethod
    def _some_models(cls, value: str) -> str:
        if not _names(value):
            raise ValueError("needs the name of a model")
        return value

    @model_validator(mode="before")
    @classmethod
    def _read_secrets(cls, values: Mapping[str, object]) -> dict[str, object]:
        return secrets_from_files(values, SECRETS)

    @field_validator("admin_api_keys")
    @classmethod
    def _hold_keys(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            parse_keys(value.get_secret_value())
        return value

    @property
    def admin_keys(self) -> Keys:
        """Empty: nothing is locked."""
        return Keys(() if self.admin_api_keys is None else parse_keys(self.admin_api_keys.get_secret_value()))

    @property
    def wanted_threads(self) -> int | None:
        return self.threads or None

    @property
    def model_names(self) -> list[str]:
        """The default model first."""
        return _names(self.models)


def _names(models: str) -> list[str]:
    return [name.strip() for name in models.split(",") if name.strip()]


def read_environment() -> Settings:
    """Raises `ConfigError`."""
    try:
        return Settings()
    except ValidationError as invalid:
        first = invalid.errors(include_url=False)[0]
        variable = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        if not variable:  # found by a check over several: its message names them
            raise ConfigError(message) from None
        value = "" if variable in SECRETS else f" (value: {str(first['input'])[:80]!r})"
        raise ConfigError(f"{variable}: {message[0].lower()}{message[1:]}{value}") from None
