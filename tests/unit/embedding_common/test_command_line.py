"""What both servers answer on the command line, each as a real process, and how fast."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

from embedding_common import command_line
from embedding_common.settings import EnvironmentSettings, variables
from embedding_service.config import Settings as GatewaySettings
from ml_base.config import Settings as ReplicaSettings

MODULES = {"embedding_service": GatewaySettings, "ml_base": ReplicaSettings, "ml_base.prepare": ReplicaSettings}
WITHOUT_LIBRARIES = """
import sys, runpy
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "sentence_transformers", "openvino", "uvicorn", "fastapi", "numpy"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import importlib.util
found = importlib.util.find_spec
def find_spec(name, package=None):
    try:
        return found(name, package)
    except ModuleNotFoundError:
        return None
importlib.util.find_spec = find_spec
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=False)
"""


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a module without the libraries of the extra, and without a web server: neither is needed for an answer."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_LIBRARIES, *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(("module", "kind"), MODULES.items())
def test_help_lists_every_variable_with_its_default_and_ends_with_0(
    module: str, kind: type[EnvironmentSettings]
) -> None:
    ended = run(module, "--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    for variable in variables(kind):
        default = f" (default: {variable.default})" if variable.default else ""
        assert f"\n  {variable.name}{default}\n" in ended.stdout
        assert variable.summary.split()[:4] == ended.stdout.partition(f"\n  {variable.name}{default}\n")[2].split()[:4]


@pytest.mark.parametrize(
    ("module", "program"),
    [("embedding_service", "embedding-service"), ("ml_base", "ml-base"), ("ml_base.prepare", "ml-base")],
)
def test_version_is_the_distributions(module: str, program: str) -> None:
    ended = run(module, "--version")
    assert (ended.returncode, ended.stdout) == (0, f"{program} {version('embedding-service')}\n")


@pytest.mark.parametrize("module", MODULES)
def test_an_unknown_argument_ends_with_2(module: str) -> None:
    ended = run(module, "--port", "1")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "--port" in ended.stderr


@pytest.mark.parametrize(("module", "program"), [("embedding_service", "embedding-service"), ("ml_base", "ml-base")])
def test_every_wrong_variable_is_one_line_behind_the_programs_name(module: str, program: str) -> None:
    ended = run(module, MAX_TEXTS="0", MAX_TEXT_BYTES="x")
    assert ended.returncode == 2
    assert [line.split(": ")[:2] for line in ended.stderr.splitlines()] == [
        [program, "MAX_TEXTS"],
        [program, "MAX_TEXT_BYTES"],
    ]


@pytest.mark.parametrize("module", ["ml_base", "ml_base.prepare"])
def test_a_model_server_without_its_extra_says_what_to_install(module: str) -> None:
    ended = run(module)
    assert ended.returncode == 1
    assert ended.stderr == (
        "ml-base: sentence_transformers and torch cannot be imported; "
        "install them with: pip install 'embedding-service[ml-base]'\n"
    )


def test_each_line_of_a_reason_is_written_behind_the_programs_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command_line.end("ml-base", 2, ValueError("one\ntwo"))
    assert (ended.value.code, capsys.readouterr().err) == (2, "ml-base: one\nml-base: two\n")
