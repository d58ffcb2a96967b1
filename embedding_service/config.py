"""The gateway's settings: read once from the environment, checked together, frozen. Units are in the names."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

MIB = 1 << 20


class SettingsError(ValueError):
    """A wrong environment: one line a variable, fit to be printed."""


class Settings(BaseSettings):
    """Every variable of the gateway, its default, and why that is the default."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", populate_by_name=True, env_ignore_empty=True)

    host: Annotated[str, Field(alias="HOST")] = "0.0.0.0"
    port: Annotated[int, Field(alias="PORT", ge=0, le=65535)] = 8888
    workers: Annotated[int, Field(alias="EMBEDDING_WORKERS", ge=1, le=64)] = 1
    """Processes on one listening socket, each with its own L1: more pay where cached answers fill a core."""

    ml_base_url: Annotated[str, Field(alias="ML_BASE_URL", pattern=r"^https?://[^/\s]+/?$")] = "http://ml-base-lb:8887"
    ml_base_timeout_s: Annotated[float, Field(alias="ML_BASE_TIMEOUT", gt=0, le=600)] = 30.0
    """One upstream call. HAProxy's own limits lie just above it, so that the gateway is the one to give up."""
    interactive_calls: Annotated[int, Field(alias="ML_BASE_INTERACTIVE_CALLS", ge=1, le=256)] = 16
    """Upstream calls in flight for people who wait: small, and many people may wait at once."""
    bulk_calls: Annotated[int, Field(alias="ML_BASE_BULK_CALLS", ge=1, le=256)] = 8
    """Two or three a replica keep one computing and the next waiting there; more only lengthens queues."""
    piece_bytes: Annotated[int, Field(alias="ML_BASE_PIECE_BYTES", ge=256, le=MIB)] = 4096
    """Text in one upstream call, about 1,000 tokens: several of a replica's batches, a fraction of a second."""
    max_pending_interactive_bytes: Annotated[int, Field(alias="MAX_PENDING_INTERACTIVE_BYTES", ge=4096)] = 1 * MIB
    max_pending_bulk_bytes: Annotated[int, Field(alias="MAX_PENDING_BULK_BYTES", ge=4096)] = 16 * MIB
    """Text admitted and not yet computed; past it a lane answers 429. 16 MiB holds the largest request there is."""

    cache_size: Annotated[int, Field(alias="EMBEDDING_CACHE_SIZE", ge=0, le=100_000_000)] = 50_000
    """L1 entries; about 2 KB each at 384 dimensions."""
    ready_json_bytes: Annotated[int, Field(alias="EMBEDDING_READY_JSON_BYTES", ge=0)] = 6 * MIB
    """Ready-made JSON of the hottest vectors, some 1,300 at 384 dimensions; measured by scripts/bench/hot_path.py."""
    cache_ttl_s: Annotated[float, Field(alias="EMBEDDING_CACHE_TTL", gt=0)] = 86_400.0

    redis_enabled: Annotated[bool, Field(alias="REDIS_ENABLED")] = True
    redis_host: Annotated[str, Field(alias="REDIS_HOST", min_length=1)] = "redis-cache"
    redis_port: Annotated[int, Field(alias="REDIS_PORT", ge=1, le=65535)] = 6379
    redis_password: Annotated[SecretStr | None, Field(alias="REDIS_PASSWORD")] = None
    redis_ttl_s: Annotated[int, Field(alias="REDIS_CACHE_TTL", ge=1, le=10 * 365 * 86_400)] = 604_800
    redis_timeout_s: Annotated[float, Field(alias="REDIS_TIMEOUT", gt=0, le=5)] = 0.05
    """One L2 look-up of up to 256 keys, which takes about 2 ms on one host; past it the texts are computed."""

    max_texts: Annotated[int, Field(alias="MAX_TEXTS", ge=1, le=1_000_000)] = 8192
    """Four times what OpenAI allows: clients that send all they have in one request exist (Chroma)."""
    max_text_bytes: Annotated[int, Field(alias="MAX_TEXT_BYTES", ge=1)] = MIB
    """Hundreds of times what any model reads before it truncates; the rest would only be tokenised for nothing."""
    max_body_bytes: Annotated[int, Field(alias="MAX_BODY_BYTES", ge=1024, le=1024 * MIB)] = 32 * MIB

    drain_s: Annotated[float, Field(alias="DRAIN_S", ge=0, le=300)] = 2.0
    """Serving on after SIGTERM while `/readyz` answers 503: two probes of a second."""
    stop_s: Annotated[float, Field(alias="STOP_S", ge=0, le=600)] = 35.0
    """Longest wait for what is in hand after draining: one upstream call and a little."""
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], Field(alias="LOG_LEVEL")] = "INFO"
    edition: Annotated[str, Field(alias="SUTRA_EDITION", max_length=64)] = "simple"

    @field_validator("log_level", mode="before")
    @classmethod
    def _any_case(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fit_together(self) -> Settings:
        if self.max_text_bytes > self.max_body_bytes:
            raise ValueError(f"MAX_TEXT_BYTES {self.max_text_bytes} is above MAX_BODY_BYTES {self.max_body_bytes}")
        return self

    def public(self) -> dict[str, object]:
        """The effective configuration by variable name, secrets hidden."""
        return {
            field.alias or name: "***" if isinstance(value := getattr(self, name), SecretStr) else value
            for name, field in type(self).model_fields.items()
        }


def from_environment() -> Settings:
    """Raises `SettingsError` with one line for each wrong variable."""
    try:
        return Settings()
    except ValidationError as invalid:
        lines = [
            f"{'.'.join(map(str, error['loc'])) or 'settings'}: {error['msg']}, got {error['input']!r}"
            if error["loc"]
            else error["msg"].removeprefix("Value error, ")
            for error in invalid.errors(include_url=False)
        ]
        raise SettingsError("\n".join(lines)) from None
