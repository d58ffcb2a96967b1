"""The gateway's settings: read once from the environment, checked together, frozen. Units are in the names."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from embedding_common.settings import EnvironmentSettings

MIB = 1 << 20


class Settings(EnvironmentSettings):
    """Every variable of the gateway, its default, and why that is the default."""

    model_config = SettingsConfigDict(populate_by_name=True)

    SECRETS: ClassVar[tuple[str, ...]] = ("API_KEYS", "ADMIN_API_KEYS", "REDIS_PASSWORD")
    HIDDEN: ClassVar[tuple[str, ...]] = ("ML_BASE_URL",)  # a URL may hold a password

    host: Annotated[str, Field(alias="HOST")] = "0.0.0.0"
    """The address to listen on. By default the gateway listens on all interfaces, as a container must."""
    port: Annotated[int, Field(alias="PORT", ge=0, le=65535)] = 8888
    """The port to listen on; 0 lets the system choose a free one."""
    workers: Annotated[int, Field(alias="EMBEDDING_WORKERS", ge=1, le=64)] = 1
    """The number of gateway processes on one listening socket. Each has its own L1, so more of them pay where cached
    answers fill a core."""

    ml_base_url: Annotated[str, Field(alias="ML_BASE_URL", pattern=r"^https?://[^/\s]+/?$")] = "http://ml-base-lb:8887"
    """The URL of the balancer in front of the replicas. It may hold a name and a password, and is shown without them.
    The default is the balancer's name in the Compose network."""
    ml_base_timeout_s: Annotated[float, Field(alias="ML_BASE_TIMEOUT", gt=0, le=600)] = 30.0
    """The longest time, in seconds, that one upstream call may take. HAProxy's own limits lie just above it, so that
    the gateway is the one to give up."""
    interactive_calls: Annotated[int, Field(alias="ML_BASE_INTERACTIVE_CALLS", ge=1, le=256)] = 16
    """The most upstream calls in flight for people who wait. Such calls are small, and many people may wait at
    once."""
    bulk_calls: Annotated[int, Field(alias="ML_BASE_BULK_CALLS", ge=1, le=256)] = 8
    """The most upstream calls in flight for bulk work. Two or three for each replica keep one computing and the next
    waiting there; more only make its queue longer."""
    piece_bytes: Annotated[int, Field(alias="ML_BASE_PIECE_BYTES", ge=256, le=MIB)] = 4096
    """The most bytes of text in one upstream call. The default is about 1,000 tokens: several of a replica's batches,
    which take a fraction of a second."""
    max_pending_interactive_bytes: Annotated[int, Field(alias="MAX_PENDING_INTERACTIVE_BYTES", ge=4096)] = 1 * MIB
    """The most bytes of text that the interactive lane admits before they are computed. Beyond it the lane answers
    429."""
    max_pending_bulk_bytes: Annotated[int, Field(alias="MAX_PENDING_BULK_BYTES", ge=4096)] = 16 * MIB
    """The most bytes of text that the bulk lane admits before they are computed. Beyond it the lane answers 429. The
    default, 16 MiB, holds the largest request there is."""

    cache_size: Annotated[int, Field(alias="EMBEDDING_CACHE_SIZE", ge=0, le=100_000_000)] = 50_000
    """The most vectors in the L1 of each process. One takes about 2 KB at 384 dimensions."""
    ready_json_bytes: Annotated[int, Field(alias="EMBEDDING_READY_JSON_BYTES", ge=0)] = 5 * MIB
    """The most bytes of ready-made JSON that each process keeps for its hottest vectors. The default holds some 1,100
    vectors at 384 dimensions; scripts/bench/hot_path.py measures what it saves."""
    cache_ttl_s: Annotated[float, Field(alias="EMBEDDING_CACHE_TTL", gt=0)] = 86_400.0
    """The lifetime, in seconds, of a vector in L1. The default is one day."""

    redis_enabled: Annotated[bool, Field(alias="REDIS_ENABLED")] = True
    """Whether Redis is used as the second cache, L2, which all gateways share."""
    redis_host: Annotated[str, Field(alias="REDIS_HOST", min_length=1)] = "redis-cache"
    """The host of Redis. The default is its name in the Compose network."""
    redis_port: Annotated[int, Field(alias="REDIS_PORT", ge=1, le=65535)] = 6379
    """The port of Redis."""
    redis_password: Annotated[SecretStr | None, Field(alias="REDIS_PASSWORD")] = None
    """The password of Redis. By default none is sent."""
    redis_password_file: Annotated[str | None, Field(alias="REDIS_PASSWORD_FILE")] = None
    """The file that holds the password of Redis, in place of `REDIS_PASSWORD`."""
    redis_ttl_s: Annotated[int, Field(alias="REDIS_CACHE_TTL", ge=1, le=10 * 365 * 86_400)] = 604_800
    """The lifetime, in seconds, of a vector in Redis. The default is one week."""
    redis_timeout_s: Annotated[float, Field(alias="REDIS_TIMEOUT", gt=0, le=5)] = 0.05
    """The longest time, in seconds, that one look-up in Redis may take. A look-up of up to 256 keys takes about 2 ms on
    one host; beyond the limit the texts are computed."""

    model_aliases: Annotated[str, Field(alias="MODEL_ALIASES", max_length=65_536)] = (
        "text-embedding-3-small=,text-embedding-3-large=,text-embedding-ada-002="
    )
    """Further names of models, as `name=model` pairs, comma separated. An empty model, or `default`, stands for the
    default model. OpenAI's own names lead there, since some clients allow no other."""
    unknown_model: Annotated[Literal["refuse", "default"], Field(alias="UNKNOWN_MODEL")] = "refuse"
    """What happens to a request whose model name is neither a model nor an alias: `refuse`, or `default` to answer it
    with the default model. The default is to refuse, because vectors of another model than the one named fit no
    index."""
    auto_truncate: Annotated[bool, Field(alias="AUTO_TRUNCATE")] = True
    """Whether a text over the model's limit is cut where the request does not say `truncate`. To refuse would fail most
    documents that clients send."""

    empty_texts: Annotated[Literal["accept", "refuse"], Field(alias="EMPTY_TEXTS")] = "accept"
    """Whether an empty string is embedded or refused in OpenAI's and TEI's dialects, whose own servers refuse it.
    Clients send one for a document without text, and to refuse it would fail the hundreds of others in its request. In
    the native dialect an empty string is a text."""

    max_texts: Annotated[int, Field(alias="MAX_TEXTS", ge=1, le=1_000_000)] = 8192
    """The most texts in one request. The default is four times what OpenAI allows, because some clients send all they
    have in one request (Chroma)."""
    openai_max_inputs: Annotated[int, Field(alias="OPENAI_MAX_INPUTS", ge=1, le=1_000_000)] = 2048
    """The most inputs in one `/v1/embeddings` request. The default is OpenAI's own limit."""
    max_text_bytes: Annotated[int, Field(alias="MAX_TEXT_BYTES", ge=1)] = MIB
    """The most bytes of one text. The default is hundreds of times what any model reads before it truncates; the rest
    would be tokenized in vain."""
    max_body_bytes: Annotated[int, Field(alias="MAX_BODY_BYTES", ge=1024, le=1024 * MIB)] = 32 * MIB
    """The most bytes of one request body."""

    body_timeout_s: Annotated[float, Field(alias="BODY_TIMEOUT", gt=0, le=3600)] = 60.0
    """The longest time, in seconds, for the body of a request to arrive. The largest body takes this long at
    4.5 Mbit/s."""

    api_keys: Annotated[SecretStr | None, Field(alias="API_KEYS")] = None
    """The keys that open the service, comma separated. Without them any key, or none, is accepted: many clients cannot
    be told to send none."""
    api_keys_file: Annotated[str | None, Field(alias="API_KEYS_FILE")] = None
    """The file that holds the keys, in place of `API_KEYS`."""
    admin_api_keys: Annotated[SecretStr | None, Field(alias="ADMIN_API_KEYS")] = None
    """The keys for `/cache/clear`, comma separated. Where there are none of these, the keys of `API_KEYS` open it."""
    admin_api_keys_file: Annotated[str | None, Field(alias="ADMIN_API_KEYS_FILE")] = None
    """The file that holds the admin keys, in place of `ADMIN_API_KEYS`."""
    operator_paths_open: Annotated[bool, Field(alias="OPERATOR_PATHS_OPEN")] = True
    """Whether health, metrics and the documentation are open without a key. Probes and scrapers seldom can send
    one."""
    check_hits: Annotated[int, Field(alias="EMBEDDING_CHECK_HITS", ge=0)] = 10_000
    """One cached text in this many is computed again and compared; 0 compares none. The default costs a ten-thousandth
    of what the cache saves."""

    drain_s: Annotated[float, Field(alias="DRAIN_S", ge=0, le=300)] = 2.0
    """How long, in seconds, the gateway serves on after SIGTERM while `/readyz` answers 503. The default is two probes
    of one second each."""
    stop_s: Annotated[float, Field(alias="STOP_S", ge=0, le=600)] = 35.0
    """The longest wait, in seconds, for requests in hand after draining. The default is one upstream call and a little
    more."""
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], Field(alias="LOG_LEVEL")] = "INFO"
    """The lowest level of messages in the log, in upper or lower case."""
    edition: Annotated[str, Field(alias="SUTRA_EDITION", max_length=64)] = "simple"
    """The name of the edition that replies and `/info` repeat. It limits nothing."""

    @field_validator("model_aliases")
    @classmethod
    def _are_pairs(cls, value: str) -> str:
        parse_aliases(value)
        return value

    @model_validator(mode="after")
    def _fit_together(self) -> Settings:
        if self.max_text_bytes > self.max_body_bytes:
            raise ValueError(f"MAX_TEXT_BYTES {self.max_text_bytes} is above MAX_BODY_BYTES {self.max_body_bytes}")
        return self

    def aliases(self) -> dict[str, str]:
        """Returns the model of each alias; "" stands for the default model."""
        return parse_aliases(self.model_aliases)

    def ml_base_shown(self) -> str:
        """Returns `ml_base_url` without the name and the password that it may hold."""
        return re.sub("//[^/]*@", "//", self.ml_base_url)

    def public(self) -> dict[str, object]:
        """Returns the effective configuration by variable name, with secrets hidden."""
        return {
            field.alias or name: "***" if isinstance(value := getattr(self, name), SecretStr) else value
            for name, field in type(self).model_fields.items()
        } | {"ML_BASE_URL": self.ml_base_shown()}


def parse_aliases(text: str) -> dict[str, str]:
    """Returns the pairs of `name=model,name=`. Raises `ValueError` for a part that is no pair."""
    aliases = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, model = (side.strip() for side in part.partition("="))
        if not (name and equals):
            raise ValueError(f"must be name=model pairs, comma separated; {part!r} is none")
        aliases[name] = model
    return aliases
