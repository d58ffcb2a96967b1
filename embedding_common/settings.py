"""What the settings of both processes share: how they are read from the environment, checked, and listed.

A settings class has one field for each variable, with its limits, its default, and a docstring that explains them.
`--help` and docs/configuration.md are made from these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping  # noqa: TC003 - pydantic reads the annotation
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from pydantic import SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from embedding_common.keys import parse_keys, secrets_from_files

_OURS = "Value error, "  # what pydantic puts before the messages of our own validators
_SHOWN_CHARS = 80


class SettingsError(ValueError):
    """The environment is wrong. The message has one line for each wrong variable, fit to be printed."""


@dataclass(frozen=True, slots=True)
class _UnreadableSecret:
    """Stands for the value of a secret whose file cannot be read, until the field is checked."""

    mistake: str


class EnvironmentSettings(BaseSettings):
    """Settings that are read once from the environment, checked together, and frozen. Units are in the names."""

    model_config = SettingsConfigDict(frozen=True, extra="ignore", env_ignore_empty=True, use_attribute_docstrings=True)

    SECRETS: ClassVar[tuple[str, ...]] = ()
    """Variables whose values are never shown or logged. Each may be given as NAME_FILE instead, since container engines
    mount secrets as files."""
    HIDDEN: ClassVar[tuple[str, ...]] = ()
    """Further variables whose values are left out of messages, because they may contain a secret."""

    @model_validator(mode="before")
    @classmethod
    def _read_secrets(cls, values: Mapping[str, object]) -> dict[str, object]:
        """Reads each secret by itself, so that one file that cannot be read hides no other mistake."""
        read = dict(values)
        for name in cls.SECRETS:
            try:
                read = secrets_from_files(read, [name])
            except ValueError as mistake:
                read[name] = _UnreadableSecret(str(mistake))
        return read

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_unreadable(cls, value: object) -> object:
        if isinstance(value, _UnreadableSecret):
            raise ValueError(value.mistake)  # noqa: TRY004 - pydantic reports only these
        return value

    @field_validator("log_level", mode="before", check_fields=False)
    @classmethod
    def _any_case(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    @field_validator("api_keys", "admin_api_keys", check_fields=False)
    @classmethod
    def _are_keys(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            parse_keys(value.get_secret_value())
        return value


S = TypeVar("S", bound=EnvironmentSettings)


def read_environment(kind: type[S]) -> S:
    """Returns the settings in the environment. Raises `SettingsError` with one line for each wrong variable."""
    try:
        return kind()
    except ValidationError as invalid:
        hidden = {*kind.SECRETS, *kind.HIDDEN}
        lines = []
        for error in invalid.errors(include_url=False):
            name = ".".join(map(str, error["loc"]))
            message = error["msg"].removeprefix(_OURS)
            if not message.startswith(name):  # else a check of several variables has named them
                message = f"{name}: {message}"
                if name not in hidden:
                    message += f", got {str(error['input'])[:_SHOWN_CHARS]!r}"
            lines.append(message)
        raise SettingsError("\n".join(lines)) from None


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable as an operator reads of it. `default` is "" if nothing is set then."""

    name: str
    default: str
    description: str

    @property
    def summary(self) -> str:
        """The first sentence of the description."""
        return re.split(r"(?<=\.)\s", self.description, maxsplit=1)[0]


def variables(kind: type[EnvironmentSettings]) -> list[Variable]:
    """Returns every variable of a settings class, in the order of its fields."""
    listed = []
    for field in kind.model_fields.values():
        extra = field.json_schema_extra
        default = extra["default"] if isinstance(extra, dict) else field.get_default()
        description = " ".join((field.description or "").split())
        listed.append(Variable(str(field.alias), _shown(default), description))
    return listed


def _shown(default: object) -> str:
    if default is None:
        return ""
    return str(default).lower() if isinstance(default, bool) else str(default)
