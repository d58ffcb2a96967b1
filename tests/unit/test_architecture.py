"""The layers of the house: which folder may import which, and where each foreign library may be used.

The imports are read from the source by `ast`, so an import inside a function or under TYPE_CHECKING counts too. A
folder may always import its own modules. A module without a row fails the test.
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

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("embedding_common", "embedding_service", "ml_base")

# A folder, or a module beside them, with everything below it -> what it may import besides the same folder. A name
# without a dot in front of a colon is of the same package. The longest name that a module falls under counts.
ARROWS = {
    "embedding_common": "",
    "embedding_common.http": "embedding_common",
    "embedding_service": "",
    "embedding_service.__main__": "config observability process embedding_common",
    "embedding_service.config": "embedding_common",
    "embedding_service.errors": "embedding_common",
    "embedding_service.app": "api cache config core observability service upstream embedding_common",
    "embedding_service.service": "api cache config core observability upstream embedding_common",
    "embedding_service.api": "config core errors cache observability service upstream embedding_common",
    "embedding_service.core": "cache errors observability embedding_common",
    "embedding_service.cache": "observability embedding_common",
    "embedding_service.upstream": "cache core errors observability embedding_common",
    "embedding_service.observability": "",
    "embedding_service.tools": "embedding_common",
    "embedding_service.process": "api app config observability embedding_common",
    "ml_base": "",
    "ml_base.__main__": "app config models wiring embedding_common",
    "ml_base.prepare": "__main__ models wiring embedding_common",
    "ml_base.wiring": "app backends config machine metrics models",
    "ml_base.config": "embedding_common",
    "ml_base.app": "config machine metrics models embedding_common",
    "ml_base.metrics": "batching embedding_common",
    "ml_base.models": "backends batching machine embedding_common",
    "ml_base.batching": "machine embedding_common",
    "ml_base.backends": "batching embedding_common",
    "ml_base.machine": "embedding_common",
}

# modules that may import nothing but the standard library and what their row above allows
STDLIB_ONLY = {
    "embedding_service.api.dialects.cl100k",
    "embedding_service.cache.entry",
    "embedding_service.cache.epoch",
    "embedding_service.cache.null_store",
    "embedding_service.cache.lru",
    "embedding_service.core.singleflight",
    "embedding_service.errors",
    "embedding_service.observability.log_throttle",
    "embedding_service.observability.scoreboard",
    "embedding_service.process.supervisor",
    "embedding_service.upstream.ejection",
    "embedding_common.errors",
    "embedding_common.http.bind",
    "embedding_common.keys",
    "ml_base.batching.batches",
    "ml_base.machine.memory",
    "ml_base.machine.threads",
}

# library, or attribute of one -> the only modules that may touch it
HOMES = {
    "redis": "embedding_service.cache.redis",
    "aiohttp": "embedding_service.upstream embedding_service.tools",
    "torch": "ml_base.backends",
    "sentence_transformers": "ml_base.backends",
    "transformers": "ml_base.backends",
    "openvino": "ml_base.backends",
    "nncf": "ml_base.backends",
    "fastapi": "embedding_service.app embedding_service.api ml_base.app embedding_common.http",
    "starlette": (
        "embedding_service.app embedding_service.api embedding_service.service ml_base.app embedding_common.http"
    ),
    "pydantic_settings": "embedding_common.settings embedding_service.config ml_base.config",
    "uvicorn": "embedding_common.http",
    "os.environ": (
        "embedding_service.tools embedding_service.__main__ embedding_service.config ml_base.wiring ml_base.config"
    ),
    "os.getenv": "embedding_service.__main__ embedding_service.config ml_base.__main__ ml_base.config",
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {module_name(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}


def is_below(module: str, parent: str) -> bool:
    return module == parent or module.startswith(f"{parent}.")


def row_of(module: str) -> str:
    """The longest row that a module falls under; a package's own row ("ml_base") covers only its direct modules."""
    rows = [row for row in ARROWS if module == row or is_below(module, row)]
    row = max(rows, key=len, default="")
    assert "." in row or row in ("embedding_common", module), f"{module} has no row in ARROWS"
    return row


def allowed_by(row: str) -> list[str]:
    """The names that a row allows, and the row itself."""
    package = row.partition(".")[0]
    names = ARROWS[row].split()
    return [row, *(name if name in PACKAGES else f"{package}.{name}" for name in names)]


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
def test_a_module_imports_only_what_its_layer_may(module: str) -> None:
    allowed = allowed_by(row_of(module))
    ours = {name for name in imports_of(module) if name.partition(".")[0] in PACKAGES}
    strangers = {name for name in ours if not any(is_below(name, parent) for parent in allowed)}
    assert not strangers, f"{module} imports {sorted(strangers)}, allowed: {allowed}"


@pytest.mark.parametrize("module", sorted(STDLIB_ONLY))
def test_a_primitive_uses_nothing_but_the_standard_library(module: str) -> None:
    foreign = {name.partition(".")[0] for name in imports_of(module)} - sys.stdlib_module_names
    assert foreign <= set(PACKAGES)


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_used_in_its_home_only(library: str) -> None:
    homes = HOMES[library].split()
    users = {module for module in SOURCES if any(is_below(name, library) for name in touches_of(module))}
    assert not {user for user in users if not any(is_below(user, home) for home in homes)}


@pytest.mark.parametrize("row", ARROWS)
def test_every_row_speaks_of_modules_that_exist(row: str) -> None:
    folders = {name.rpartition(".")[0] for name in SOURCES}
    assert {row, *allowed_by(row)} <= SOURCES.keys() | folders


@pytest.mark.parametrize(
    ("package", "stranger"),
    [
        ("ml_base", "embedding_service"),
        ("embedding_service", "ml_base"),
        ("embedding_common", "embedding_service"),
        ("embedding_common", "ml_base"),
    ],
)
def test_no_package_imports_a_package_above_or_beside_it(package: str, stranger: str) -> None:
    ours = [module for module in SOURCES if is_below(module, package)]
    assert ours
    assert not [module for module in ours if any(is_below(name, stranger) for name in imports_of(module))]


def test_the_gateway_starts_without_loading_torch() -> None:
    heavy = ("torch", "transformers", "sentence_transformers", "openvino")
    code = f"import sys, embedding_service.app; print([name for name in {heavy} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
