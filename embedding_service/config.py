"""The gateway's settings: read once from the environment, checked together, frozen. Units are in the names."""

from __future__ import annotations

import re
from collections.abc import Mapping  # noqa: TC003 - pydantic reads the annotation
from typing import Annotated, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from embedding_common.keys import parse_keys, secrets_from_files

SECRETS = ("API_KEYS", "ADMIN_API_KEYS", "REDIS_PASSWORD")
_UNSHOWN = {*SECRETS, "ML_BASE_URL"}  # a URL may hold a password
"""Each may be given as NAME_FILE instead, as container engines mount secrets. Never shown or logged."""

MIB = 1 << 20
_OURS = "Value error, "  # what pydantic puts before the messages of our own validators


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
    ready_json_bytes: Annotated[int, Field(alias="EMBEDDING_READY_JSON_BYTES", ge=0)] = 5 * MIB
    """Ready-made JSON of the hottest vectors, some 1,100 at 384 dimensions; measured by scripts/bench/hot_path.py."""
    cache_ttl_s: Annotated[float, Field(alias="EMBEDDING_CACHE_TTL", gt=0)] = 86_400.0

    redis_enabled: Annotated[bool, Field(alias="REDIS_ENABLED")] = True
    redis_host: Annotated[str, Field(alias="REDIS_HOST", min_length=1)] = "redis-cache"
    redis_port: Annotated[int, Field(alias="REDIS_PORT", ge=1, le=65535)] = 6379
    redis_password: Annotated[SecretStr | None, Field(alias="REDIS_PASSWORD")] = None
    redis_password_file: Annotated[str | None, Field(alias="REDIS_PASSWORD_FILE")] = None
    redis_ttl_s: Annotated[int, Field(alias="REDIS_CACHE_TTL", ge=1, le=10 * 365 * 86_400)] = 604_800
    redis_timeout_s: Annotated[float, Field(alias="REDIS_TIMEOUT", gt=0, le=5)] = 0.05
    """One L2 look-up of up to 256 keys, which takes about 2 ms on one host; past it the texts are computed."""

    model_aliases: Annotated[str, Field(alias="MODEL_ALIASES", max_length=65_536)] = (
        "text-embedding-3-small=,text-embedding-3-large=,text-embedding-ada-002="
    )
    """`name=model`, comma separated; no model, or `default`, is the default one. OpenAI's own names lead there, since
    some clients allow no other."""
    unknown_model: Annotated[Literal["refuse", "default"], Field(alias="UNKNOWN_MODEL")] = "refuse"
    """A name that neither a model nor an alias has. Vectors of another model than the one named fit no index."""
    auto_truncate: Annotated[bool, Field(alias="AUTO_TRUNCATE")] = True
    """What a request means that does not say `truncate`: to refuse would fail most documents that clients send."""

    empty_texts: Annotated[Literal["accept", "refuse"], Field(alias="EMPTY_TEXTS")] = "accept"
    """In OpenAI's and TEI's dialects, whose own servers refuse them. Clients send one for a document without text, and
    to refuse it would fail the hundreds of others in its request. In the native dialect they are texts."""

    max_texts: Annotated[int, Field(alias="MAX_TEXTS", ge=1, le=1_000_000)] = 8192
    """Four times what OpenAI allows: clients that send all they have in one request exist (Chroma)."""
    openai_max_inputs: Annotated[int, Field(alias="OPENAI_MAX_INPUTS", ge=1, le=1_000_000)] = 2048
    """Inputs of one `/v1/embeddings` request: OpenAI's own limit."""
    max_text_bytes: Annotated[int, Field(alias="MAX_TEXT_BYTES", ge=1)] = MIB
    """Hundreds of times what any model reads before it truncates; the rest would only be tokenised for nothing."""
    max_body_bytes: Annotated[int, Field(alias="MAX_BODY_BYTES", ge=1024, le=1024 * MIB)] = 32 * MIB

    body_timeout_s: Annotated[float, Field(alias="BODY_TIMEOUT", gt=0, le=3600)] = 60.0
    """For a request's body to arrive: the largest takes this long at 4.5 Mbit/s."""

    api_keys: Annotated[SecretStr | None, Field(alias="API_KEYS")] = None
    """Comma separated. Without them any key, or none, is accepted: many clients cannot send none."""
    api_keys_file: Annotated[str | None, Field(alias="API_KEYS_FILE")] = None
    admin_api_keys: Annotated[SecretStr | None, Field(alias="ADMIN_API_KEYS")] = None
    """For `/cache/clear`, which API keys open where there are none of these."""
    admin_api_keys_file: Annotated[str | None, Field(alias="ADMIN_API_KEYS_FILE")] = None
    operator_paths_open: Annotated[bool, Field(alias="OPERATOR_PATHS_OPEN")] = True
    """Health, metrics and the documentation need no key: probes and scrapers seldom can send one."""
    check_hits: Annotated[int, Field(alias="EMBEDDING_CHECK_HITS", ge=0)] = 10_000
    """One cached text in so many is computed again and compared; 0: none. A ten-thousandth of what hits save."""

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

    @field_validator("model_aliases")
    @classmethod
    def _pairs(cls, value: str) -> str:
        parse_aliases(value)
        return value

    def aliases(self) -> dict[str, str]:
        """Name -> model; "" is the default one."""
        return parse_aliases(self.model_aliases)

    @model_validator(mode="before")
    @classmethod
    def _read_secrets(cls, values: Mapping[str, object]) -> dict[str, object]:
        return secrets_from_files(values, SECRETS)

    @field_validator("api_keys", "admin_api_keys")
    @classmethod
    def _hold_keys(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            parse_keys(value.get_secret_value())
        return value

    @model_validator(mode="after")
    def _fit_together(self) -> Settings:
        if self.max_text_bytes > self.max_body_bytes:
            raise ValueError(f"MAX_TEXT_BYTES {self.max_text_bytes} is above MAX_BODY_BYTES {self.max_body_bytes}")
        return self

    def ml_base_shown(self) -> str:
        """`ml_base_url` without the name and the password that it may hold."""
        return re.sub("//[^/]*@", "//", self.ml_base_url)

    def public(self) -> dict[str, object]:
        """The effective configuration by variable name, secrets hidden."""
        return {
            field.alias or name: "***" if isinstance(value := getattr(self, name), SecretStr) else value
            for name, field in type(self).model_fields.items()
        } | {"ML_BASE_URL": self.ml_base_shown()}


def parse_aliases(text: str) -> dict[str, str]:
    """Of `name=model,name=`. Raises `ValueError` for a part that is no pair."""
    aliases = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, model = (word.strip() for word in part.partition("="))
        if not (name and equals):
            raise ValueError(f"must be name=model pairs, comma separated; {part!r} is none")
        aliases[name] = model
    return aliases


def from_environment() -> Settings:
    """Raises `SettingsError` with one line for each wrong variable."""
    try:
        return Settings()
    except ValidationError as invalid:
        lines = [
            f"{name}: {error['msg'].removeprefix(_OURS)}" + ("" if name in _UNSHOWN else f", got {error['input']!r}")
            if (name := ".".join(map(str, error["loc"])))
            else error["msg"].removeprefix(_OURS)
            for error in invalid.errors(include_url=False)
        ]
        raise SettingsError("\n".join(lines)) from None
