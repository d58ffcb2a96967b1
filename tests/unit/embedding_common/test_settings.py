from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import pytest
from pydantic import Field, SecretStr

from embedding_common.settings import EnvironmentSettings, SettingsError, Variable, read_environment, variables
from embedding_service.config import Settings as GatewaySettings
from ml_base.config import Settings as ReplicaSettings

if TYPE_CHECKING:
    from pathlib import Path


class Settings(EnvironmentSettings):
    SECRETS: ClassVar[tuple[str, ...]] = ("API_KEYS", "ADMIN_API_KEYS")
    HIDDEN: ClassVar[tuple[str, ...]] = ("SOME_URL",)

    port: Annotated[int, Field(alias="SOME_PORT", ge=1)] = 80
    """The port. It is
    the usual one."""
    url: Annotated[str, Field(alias="SOME_URL", pattern="^http")] = "http://x"
    """The URL."""
    fast: Annotated[bool, Field(alias="SOME_FAST")] = True
    """Whether it is fast."""
    api_keys: Annotated[SecretStr | None, Field(alias="API_KEYS")] = None
    """The keys."""
    admin_api_keys: Annotated[SecretStr | None, Field(alias="ADMIN_API_KEYS")] = None
    """More keys."""
    admin_api_keys_file: Annotated[str | None, Field(alias="ADMIN_API_KEYS_FILE")] = None
    """The file of more keys."""
    log_level: Annotated[Literal["INFO", "DEBUG"], Field(alias="LOG_LEVEL")] = "INFO"
    """The level."""


def test_every_wrong_variable_has_a_line_and_no_secret_is_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {
        "SOME_PORT": "0",
        "SOME_URL": "ftp://user:marker@x",
        "SOME_FAST": "x" * 200,
        "API_KEYS": "märker",
        "ADMIN_API_KEYS_FILE": str(tmp_path / "missing"),
        "LOG_LEVEL": "chatty",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as wrong:
        read_environment(Settings)
    assert str(wrong.value).splitlines() == [
        "SOME_PORT: Input should be greater than or equal to 1, got '0'",
        "SOME_URL: String should match pattern '^http'",
        f"SOME_FAST: Input should be a valid boolean, unable to interpret input, got '{'x' * 80}'",
        "API_KEYS: a key must be of printable ASCII characters",
        f"ADMIN_API_KEYS_FILE: cannot read {tmp_path}/missing: No such file or directory",
        "LOG_LEVEL: Input should be 'INFO' or 'DEBUG', got 'CHATTY'",
    ]


def test_variables_are_listed_with_default_and_description() -> None:
    assert variables(Settings)[:3] == [
        Variable("SOME_PORT", "80", "The port. It is the usual one."),
        Variable("SOME_URL", "http://x", "The URL."),
        Variable("SOME_FAST", "true", "Whether it is fast."),
    ]
    assert variables(Settings)[0].summary == "The port."


@pytest.mark.parametrize("kind", [GatewaySettings, ReplicaSettings])
def test_every_setting_of_both_processes_is_explained_in_full_sentences(kind: type[EnvironmentSettings]) -> None:
    for variable in variables(kind):
        assert variable.name.isupper()
        assert variable.description.endswith("."), variable.name
        assert variable.description[0].isupper(), variable.name
