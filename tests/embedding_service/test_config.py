from __future__ import annotations

import subprocess
import sys

import pytest

from embedding_service.config import Settings, SettingsError, from_environment

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


@pytest.mark.parametrize(
    ("variable", "value", "told"),
    [
        ("PORT", "70000", "PORT: Input should be less than or equal to 65535, got '70000'"),
        ("REDIS_ENABLED", "perhaps", "REDIS_ENABLED: "),
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
        from_environment()
    assert str(wrong.value).startswith(told)
    assert "\n" not in str(wrong.value)


def test_the_process_exits_with_2_and_the_line() -> None:
    command = [sys.executable, "-m", "embedding_service"]
    ended = subprocess.run(command, env={"PORT": "x"}, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith("embedding-service: PORT: ")
    assert "Traceback" not in ended.stderr
