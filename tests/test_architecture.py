"""The arrows of the house: which module may know of which, and where each foreign library may be used.

Read from the source by `ast`, so that an import inside a function or under TYPE_CHECKING counts too. To let a module
know of another, add it to its row; a module without a row fails the test.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
EVERYTHING = "*"  # in a row: all of its own package

# What the gateway may know of the model server: the contract both ends share.
CONTRACT = "ml_base.wire ml_base.native ml_base.asgi ml_base.errors"

# module (with all that is below it) -> the modules of this project it may import
ARROWS = {
    "embedding_service": "",
    "embedding_service.__main__": "board config workers ml_base.listening",
    "embedding_service.server": "app config metrics workers ml_base.asgi ml_base.protocol",
    "embedding_service.workers": "",
    "embedding_service.config": "ml_base.keys",
    "embedding_service.auth": "errors ml_base.keys",
    "embedding_service.drift": "ask entry errors metrics ml_base.wire",
    "embedding_service.app": f"* {CONTRACT} ml_base.keys",
    "embedding_service.service": f"* {CONTRACT}",
    "embedding_service.api": (
        f"api ask catalog cl100k config embedder errors metrics replicas service singleflight vectors {CONTRACT}"
    ),
    "embedding_service.cl100k": "errors",
    "embedding_service.embedder": (
        "admission ask catalog drift entry errors fill lru metrics singleflight upstream ml_base.wire"
    ),
    "embedding_service.ask": "entry metrics singleflight vectors ml_base.wire",
    "embedding_service.vectors": "entry ml_base.native",
    "embedding_service.fill": "catalog entry errors lru metrics singleflight upstream ml_base.wire",
    "embedding_service.admission": "errors ml_base.wire",
    "embedding_service.catalog": "entry errors singleflight ml_base.wire",
    "embedding_service.entry": "",
    "embedding_service.lru": "",
    "embedding_service.singleflight": "",
    "embedding_service.redis_cache": "entry metrics ml_base.wire",
    "embedding_service.balancer": "errors",
    "embedding_service.ejection": "",
    "embedding_service.replicas": "balancer ejection entry errors metrics seldom ml_base.wire",
    "embedding_service.seldom": "",
    "embedding_service.upstream": "admission balancer entry errors metrics replicas seldom singleflight ml_base.wire",
    "embedding_service.errors": "ml_base.errors",
    "embedding_service.metrics": "board",
    "embedding_service.board": "",
    "ml_base": "",
    "ml_base.__main__": "app asgi config listening loading protocol wiring",
    "ml_base.prepare": "config loading wiring",
    "ml_base.wiring": "*",
    "ml_base.config": "keys",
    "ml_base.keys": "",
    "ml_base.app": "asgi config errors keys memory metrics models native threads wire",
    "ml_base.batcher": "errors slices wire worker",
    "ml_base.slices": "shapes wire",
    "ml_base.shapes": "",
    "ml_base.worker": "errors",
    "ml_base.models": "errors loading memory native served wire worker",
    "ml_base.served": "backends batcher errors loading native slices wire worker",
    "ml_base.loading": "backends memory warmup wire",
    "ml_base.warmup": "backends",
    "ml_base.memory": "",
    "ml_base.backends": "backends errors selftest shapes wire",
    "ml_base.selftest": "backends",
    "ml_base.metrics": "slices wire",
    "ml_base.threads": "",
    "ml_base.wire": "errors",
    "ml_base.native": "errors wire",
    "ml_base.listening": "",
    "ml_base.asgi": "errors native protocol wire",
    "ml_base.protocol": "native",
    "ml_base.errors": "",
}

# modules that may import nothing but the standard library and what their row above allows
STDLIB_ONLY = {
    "embedding_service.entry",
    "embedding_service.board",
    "embedding_service.cl100k",
    "embedding_service.ejection",
    "embedding_service.errors",
    "embedding_service.lru",
    "embedding_service.seldom",
    "embedding_service.singleflight",
    "embedding_service.workers",
    "ml_base.errors",
    "ml_base.keys",
    "ml_base.listening",
    "ml_base.memory",
    "ml_base.shapes",
    "ml_base.threads",
}

# library, or attribute of one -> the only modules that may touch it
HOMES = {
    "redis": "embedding_service.redis_cache",
    "aiohttp": "embedding_service.balancer",
    "torch": "ml_base.backends",
    "sentence_transformers": "ml_base.backends",
    "transformers": "ml_base.backends",
    "openvino": "ml_base.backends",
    "nncf": "ml_base.backends",
    "fastapi": "embedding_service.app embedding_service.api ml_base.app ml_base.asgi",
    "starlette": "embedding_service.app embedding_service.api embedding_service.service ml_base.app ml_base.asgi",
    "pydantic_settings": "embedding_service.config ml_base.config",
    "uvicorn": "embedding_service.server ml_base.__main__ ml_base.asgi ml_base.protocol",
    "os.environ": "embedding_service.__main__ embedding_service.config ml_base.wiring ml_base.config",
    "os.getenv": "embedding_service.__main__ embedding_service.config ml_base.__main__ ml_base.config",
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {
    module_name(path): path for package in ("embedding_service", "ml_base") for path in (ROOT / package).rglob("*.py")
}


def is_below(module: str, parent: str) -> bool:
    return module == parent or module.startswith(f"{parent}.")


def row_of(module: str) -> str:
    """The longest row a module falls under; a package's own row ("ml_base") covers its `__init__` only."""
    rows = [row for row in ARROWS if module == row or ("." in row and is_below(module, row))]
    assert rows, f"{module} has no row in ARROWS: decide what it may know of"
    return max(rows, key=len)


def allowed_by(row: str) -> list[str]:
    package = row.partition(".")[0]
    names = ARROWS[row].split()
    return [package if name == EVERYTHING else name if "." in name else f"{package}.{name}" for name in names]


def imports_of(module: str) -> Iterator[str]:
    """Dotted names, as deep as the source tells: `from a.b import c` gives a.b.c where that is a module, else a.b."""
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: relative import"
            yield from (deepest(f"{node.module}.{alias.name}", str(node.module)) for alias in node.names)


def deepest(name: str, parent: str) -> str:
    return name if name in SOURCES or name in HOMES else parent


def touches_of(module: str) -> Iterator[str]:
    """Imports, and attributes of imported modules such as os.environ."""
    yield from imports_of(module)
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


@pytest.mark.parametrize("module", SOURCES)
def test_a_module_knows_only_of_the_modules_in_its_row(module: str) -> None:
    allowed = allowed_by(row_of(module))
    ours = {name for name in imports_of(module) if name.partition(".")[0] in {"embedding_service", "ml_base"}}
    strangers = {name for name in ours if not any(is_below(name, parent) for parent in allowed)}
    assert not strangers, f"{module} imports {sorted(strangers)}, allowed: {allowed}"


@pytest.mark.parametrize("module", sorted(STDLIB_ONLY))
def test_a_primitive_uses_nothing_but_the_standard_library(module: str) -> None:
    foreign = {name.partition(".")[0] for name in imports_of(module)} - sys.stdlib_module_names
    assert foreign <= {"embedding_service", "ml_base"}


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_used_in_its_home_only(library: str) -> None:
    homes = HOMES[library].split()
    users = {module for module in SOURCES if any(is_below(name, library) for name in touches_of(module))}
    assert not {user for user in users if not any(is_below(user, home) for home in homes)}


@pytest.mark.parametrize("row", ARROWS)
def test_every_row_speaks_of_modules_that_exist(row: str) -> None:
    folders = {name.rpartition(".")[0] for name in SOURCES}
    assert {row, *allowed_by(row)} <= SOURCES.keys() | folders


def test_the_model_server_knows_nothing_of_the_gateway() -> None:
    assert not [row for row in ARROWS if row.startswith("ml_base") and "embedding_service" in ARROWS[row]]


def test_the_gateway_starts_without_loading_torch() -> None:
    heavy = ("torch", "transformers", "sentence_transformers", "openvino")
    code = f"import sys, embedding_service.app; print([name for name in {heavy} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
