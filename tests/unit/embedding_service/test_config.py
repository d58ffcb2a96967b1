from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from embedding_common.settings import SettingsError, read_environment
from embedding_service.app import build_service
from embedding_service.config import Settings
from embedding_service.observability.metrics import Metrics

if TYPE_CHECKING:
    from pathlib import Path

DEFAULTS = {
    "PORT": 8888,
    "ML_BASE_URL": "http://ml-base-lb:8887",
    "ML_BASE_TIMEOUT": 30,
    "EMBEDDING_CACHE_SIZE": 50_000,
    "EMBEDDING_CACHE_TTL": 86_400,
    "EMBEDDING_WORKERS": 1,
    "REDIS_ENABLED": True,
    "REDIS_HOST": "redis-cache",
    "REDIS_PORT": 6379,
    "REDIS_CACHE_TTL": 604_800,
    "MAX_BODY_BYTES": 32 * 1024 * 1024,
    "LOG_LEVEL": "INFO",
    "SUTRA_EDITION": "simple",
}


def test_defaults_are_the_contracts() -> None:
    public = Settings().public()
    assert {name: public[name] for name in DEFAULTS} == DEFAULTS


def test_openais_names_lead_to_the_default_model_unless_told_otherwise() -> None:
    assert Settings().aliases()["text-embedding-3-small"] == ""
    assert Settings(MODEL_ALIASES=" a = b , c=").aliases() == {"a": "b", "c": ""}


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("PORT", "70000", "PORT: Input should be less than or equal to 65535, got '70000'"),
        ("REDIS_ENABLED", "perhaps", "REDIS_ENABLED: "),
        ("MODEL_ALIASES", "a=b,c", "MODEL_ALIASES: must be name=model pairs, comma separated; 'c' is none"),
        ("UNKNOWN_MODEL", "guess", "UNKNOWN_MODEL: Input should be 'refuse' or 'default'"),
        ("EMPTY_TEXTS", "no", "EMPTY_TEXTS: Input should be 'accept' or 'refuse'"),
        ("ML_BASE_URL", "ml-base-lb", "ML_BASE_URL: "),
        ("ML_BASE_TIMEOUT", "0", "ML_BASE_TIMEOUT: Input should be greater than 0, got '0'"),
        ("EMBEDDING_WORKERS", "0", "EMBEDDING_WORKERS: Input should be greater than or equal to 1, got '0'"),
        ("MAX_TEXT_BYTES", str(1 << 30), "MAX_TEXT_BYTES 1073741824 is above MAX_BODY_BYTES 33554432"),
    ],
)
def test_a_wrong_variable_is_one_line_that_names_it(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, told: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as wrong:
        read_environment(Settings)
    assert str(wrong.value).startswith(told)
    assert "\n" not in str(wrong.value)


def test_the_process_exits_with_2_and_the_line() -> None:
    command = [sys.executable, "-m", "embedding_service"]
    ended = subprocess.run(command, env={"PORT": "x"}, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("embedding-service: PORT: ")
    assert "Traceback" not in ended.stderr


SECRETS = ["API_KEYS", "ADMIN_API_KEYS", "REDIS_PASSWORD"]


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_may_come_from_a_file_and_is_never_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    (tmp_path / "secret").write_text("marker\n")
    monkeypatch.setenv(f"{name}_FILE", str(tmp_path / "secret"))
    settings = read_environment(Settings)
    secret = getattr(settings, name.lower())
    assert secret.get_secret_value() == "marker"
    assert settings.public()[name] == "***"
    assert "marker" not in repr(settings) + str(settings)


@pytest.mark.parametrize("name", SECRETS[:2])
def test_a_refused_secret_is_not_repeated(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "märker")
    with pytest.raises(SettingsError) as wrong:
        read_environment(Settings)
    assert str(wrong.value) == f"{name}: a key must be of printable ASCII characters"


def test_a_missing_file_of_keys_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEYS_FILE", "/nowhere/keys")
    with pytest.raises(SettingsError, match="API_KEYS_FILE: cannot read /nowhere/keys: No such file"):
        read_environment(Settings)


def test_a_password_in_the_balancers_url_is_not_shown() -> None:
    settings = Settings(ml_base_url="https://gateway:s3c@ret@balancer:8887")
    assert settings.public()["ML_BASE_URL"] == "https://balancer:8887"
    assert build_service(settings, Metrics()).unhealthy()[-1] == "no replica answers at https://balancer:8887"


def test_nor_where_the_url_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ML_BASE_URL", "http://gateway:s3cret@balancer:8887/path")
    with pytest.raises(SettingsError) as refused:
        read_environment(Settings)
    assert "ML_BASE_URL" in str(refused.value)
    assert "s3cret" not in str(refused.value)
