from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest

from embedding_common.settings import SettingsError, read_environment
from ml_base import config
from ml_base.config import Settings


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in Settings.model_fields.values():
        monkeypatch.delenv(str(field.validation_alias), raising=False)


def test_the_defaults_are_those_of_the_design() -> None:
    settings = read_environment(Settings)
    assert (settings.port, settings.max_batch_texts, settings.batch_timeout_ms) == (8887, 64, 50)
    assert (settings.max_texts, settings.max_body_bytes, settings.edition) == (8192, 32 << 20, "simple")
    assert settings.instance_id == socket.gethostname()


def test_variables_are_read_and_an_empty_one_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ML_BASE_PORT", "18001")
    monkeypatch.setenv("ML_BASE_THREADS", "")
    monkeypatch.setenv("LOG_LEVEL", "debug")
    settings = read_environment(Settings)
    assert (settings.port, settings.threads, settings.log_level) == (18001, 0, "DEBUG")


@pytest.mark.parametrize("name", ["HOST", "PORT", "HOSTNAME", "THREADS", "host", "ml_base_port"])
def test_only_the_documented_names_are_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read_environment(Settings)
    monkeypatch.setenv(name, "7")
    assert read_environment(Settings) == before


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("ML_BASE_PORT", "0", "greater than or equal to 1"),
        ("ML_BASE_PORT", "http", "valid integer"),
        ("ML_BASE_BACKEND", "onnx", "'auto', 'torch' or 'openvino'"),
        ("ML_BASE_DTYPE", "int4", "'auto', 'float32', 'bfloat16', 'float16' or 'int8'"),
        ("ML_BASE_DEVICE", "gpu", "'auto', 'cpu' or 'cuda'"),
        ("ML_BASE_MODELS", " , ", "needs the name of a model"),
        ("ML_BASE_LOAD_AT_START", "none", "'default' or 'all'"),
        ("ML_BASE_MODEL_UNLOAD_TIMEOUT", "-1", "greater than or equal to 0"),
        ("ML_BASE_MAX_SLICE_MS", "0", "greater than 0"),
        ("ML_BASE_MAX_BATCH_SIZE", "-1", "greater than or equal to 1"),
        ("ML_BASE_BULK_SHARE", "1.5", "less than or equal to 1"),
        ("ML_BASE_THREADS", "many", "valid integer"),
        ("INSTANCE_ID", "two words", "match pattern"),
        ("LOG_LEVEL", "CHATTY", "'DEBUG', 'INFO'"),
    ],
)
def test_a_wrong_value_is_one_line_naming_variable_limit_and_value(
    name: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as wrong:
        read_environment(Settings)
    message = str(wrong.value)
    assert message.startswith(f"{name}: ")
    assert says in message
    assert repr(value) in message
    assert "\n" not in message


def test_auto_means_that_we_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ML_BASE_THREADS", "auto")
    monkeypatch.setenv("ML_BASE_MAX_BATCH_TOKENS", "AUTO")
    settings = read_environment(Settings)
    assert settings.wanted_threads is None
    assert settings.max_batch_tokens == 0


def test_what_the_operator_sets_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ML_BASE_THREADS", "3")
    monkeypatch.setenv("ML_BASE_MAX_BATCH_TOKENS", "100")
    settings = read_environment(Settings)
    assert settings.wanted_threads == 3
    assert settings.max_batch_tokens == 100


def test_the_first_model_named_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ML_BASE_MODELS", "first, maker/second ,,./third")
    assert read_environment(Settings).model_names == ["first", "maker/second", "./third"]


def test_settings_cannot_be_changed_later() -> None:
    with pytest.raises(ValueError, match="frozen"):
        read_environment(Settings).port = 1


def test_drain_and_finish_end_before_docker_loses_its_patience() -> None:
    settings = read_environment(Settings)
    assert settings.drain_s + settings.finish_s < 10


def test_each_variable_has_one_field() -> None:
    names = re.findall(r'\balias="(\w+)"', Path(config.__file__).read_text())
    assert len(names) == len(set(names)) == len(Settings.model_fields)


def test_admin_keys_are_read_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADMIN_API_KEYS", "marker-a,marker-b")
    settings = read_environment(Settings)
    assert b"marker-b" in settings.admin_keys
    assert "marker" not in repr(settings) + str(settings.model_dump())


def test_a_refused_secret_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADMIN_API_KEYS", "märker")
    with pytest.raises(SettingsError) as wrong:
        read_environment(Settings)
    assert str(wrong.value) == "ADMIN_API_KEYS: a key must be of printable ASCII characters"
