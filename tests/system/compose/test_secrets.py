"""compose/secrets.yml on the running stack: keys and passwords from files, and nowhere to be read."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.system.compose.project import eventually, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.system.compose.project import Project

pytestmark = [pytest.mark.compose, pytest.mark.timeout(300)]

FILES = ["-f", "compose.yaml", "-f", "compose/secrets.yml"]


@pytest.fixture
def locked(project: Project, tmp_path: Path) -> Iterator[Project]:
    """The project with a password for Redis and keys for callers; afterwards without."""
    secrets = {}
    for name in ("redis_password", "api_keys", "admin_api_keys"):
        file = tmp_path / name
        file.write_text(f"secret-of-{name}\n")
        file.chmod(0o444)
        secrets[f"{name.upper()}_SECRET"] = str(file)
    locked = replace(project, environment=project.environment | secrets)
    locked.compose(*FILES, "up", "--detach", "--wait", "--no-deps", "redis-cache", "embedding")
    yield locked
    project.up()


def test_secrets_from_files_lock_redis_and_the_gateway_and_show_nowhere(locked: Project) -> None:
    url, body = locked.url("EMBEDDING_PORT", "/embed"), {"texts": ["behind a lock"]}
    key = {"authorization": "Bearer secret-of-api_keys"}
    with httpx.Client(timeout=30, trust_env=False) as client:
        assert client.post(url, json=body).status_code == 401
        assert client.post(url, json=body, headers=key).status_code == 200
        stats = locked.url("EMBEDDING_PORT", "/cache/stats")
        eventually(lambda: client.get(stats, headers=key).json()["l2"]["connected"], "Redis takes the password")
    ping = locked.compose(*FILES, "exec", "-T", "redis-cache", "redis-cli", "ping")
    assert "NOAUTH" in ping
    containers = [*locked.containers("embedding"), *locked.containers("redis-cache")]
    assert "secret-of-" not in run("docker", "inspect", *containers)
    assert "secret-of-" not in run("docker", "top", containers[-1])
