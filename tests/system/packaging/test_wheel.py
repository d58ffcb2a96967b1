"""What `pip install` of the wheel gives, in an environment that has nothing else."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
import zipfile
from http import HTTPStatus
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
COMMANDS = ("embedding-service", "ml-base", "embedding-warm", "embedding-validate")

pytestmark = pytest.mark.stack


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, timeout=280, check=False
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    built = run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT, cwd=folder)
    assert built.returncode == 0, built.stderr[-2000:]
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of a new environment with the wheel and its base dependencies, so without torch."""
    folder = tmp_path_factory.mktemp("environment")
    assert run(sys.executable, "-m", "venv", folder / "venv", cwd=folder).returncode == 0
    installed = run(folder / "venv/bin/python", "-m", "pip", "install", "-q", "--no-input", wheel, cwd=folder)
    assert installed.returncode == 0, installed.stderr[-2000:]
    return folder / "venv/bin"


def test_the_wheel_holds_three_packages_their_types_and_the_licence(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for package in ("embedding_common", "embedding_service", "ml_base"):
        assert f"{package}/py.typed" in names
    assert "ml_base/backends/calibration.txt" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "scripts/"))]


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_says_what_it_takes_and_its_version(scripts: Path, command: str) -> None:
    told = run(scripts / command, "--help", cwd=scripts)
    assert (told.returncode, told.stderr) == (0, "")
    assert re.match(rf"usage: (python -m )?{command}|usage: (warm_cache|validate_scaling)\.py", told.stdout)
    told = run(scripts / command, "--version", cwd=scripts)
    assert told.returncode == 0
    assert version("embedding-service") in told.stdout


def test_the_installed_gateway_serves_and_ends_cleanly(scripts: Path, unused_port: int) -> None:
    settings = {"HOST": "127.0.0.1", "PORT": str(unused_port), "REDIS_ENABLED": "false", "DRAIN_S": "0"}
    with subprocess.Popen([scripts / "embedding-service"], env={"PATH": os.environ["PATH"], **settings}) as gateway:
        try:
            assert eventually_alive(unused_port)
        finally:
            gateway.send_signal(signal.SIGTERM)
        assert gateway.wait(30) == 0


def eventually_alive(port: int) -> bool:
    for _ in range(200):
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/livez", timeout=1) as reply:
            return bool(reply.status == HTTPStatus.OK)
        time.sleep(0.1)
    return False


def test_a_model_server_without_its_extra_says_what_to_install(scripts: Path) -> None:
    told = run(scripts / "ml-base", cwd=scripts)
    assert told.returncode != 0
    assert len(told.stderr.splitlines()) == 1
    assert "ml-base]" in told.stderr
