"""Nothing that arrives from outside is ever executed: read from the source of all packages."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    path for package in ("embedding_common", "embedding_service", "ml_base") for path in (ROOT / package).rglob("*.py")
]
RUNS_WHAT_IT_READS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
CALLS = {"eval", "exec", "compile"}


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_no_module_reads_a_format_that_can_carry_code(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.partition(".")[0] for name in names} & RUNS_WHAT_IT_READS
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in CALLS, f"line {node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_code_that_comes_with_a_model_runs_only_where_a_setting_says_so(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        for keyword in node.keywords if isinstance(node, ast.Call) else []:
            if keyword.arg in {"trust_remote_code", "allow_pickle"}:
                constant = isinstance(keyword.value, ast.Constant)
                assert not constant or keyword.value.value is False, f"line {node.lineno}"  # type: ignore[attr-defined]
                assert constant or keyword.arg == "trust_remote_code", f"line {node.lineno}"
