"""What compose/secrets.yml makes of a password: no engine is needed for that."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import pytest
import yaml

from tests.system.compose.project import ROOT

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("password", "quoted"),
    [("with space", '"with space"'), ('a"b', r'"a\"b"'), (r"a\x41", r'"a\\x41"'), ("a$b`c'd&e", '"a$b`c\'d&e"')],
)
def test_redis_is_told_every_password_in_its_own_quotes(tmp_path: Path, password: str, quoted: str) -> None:
    (tmp_path / "redis_password").write_text(f"{password}\n")
    assert told(tmp_path) == f"requirepass {quoted}\n"


@pytest.mark.parametrize("content", [None, "", "\n"])
def test_redis_does_not_start_open_where_its_password_cannot_be_read(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "redis_password").write_text(content)
    with pytest.raises(subprocess.CalledProcessError):
        told(tmp_path)


def told(folder: Path) -> str:
    """What redis-server gets on its standard input, with `folder` for /run/secrets."""
    server = folder / "redis-server"
    server.write_text("#!/bin/sh\ncat\n")
    server.chmod(0o755)
    services = yaml.safe_load((ROOT / "compose" / "secrets.yml").read_text())["services"]
    script = services["redis-cache"]["command"][-1].replace("$$", "$").replace("/run/secrets", str(folder))
    env = {"PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run(["sh", "-c", script], env=env, capture_output=True, text=True, check=True).stdout
