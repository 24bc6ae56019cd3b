"""Allowed imports between the packages, and forbidden ones."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
#: The packages and modules of the server, lowest first: each may import only those below it.
LAYERS = [
    {
        "settings", "environment", "tokens", "messages", "logs", "errors", "finite", "texts",
        "patterns", "fonts", "connection", "study_client", "client",
    },
    {"models"},
    {"database", "files"},
    {"jobs", "judging"},
    {"races"},
    {"upkeep"},
    {"api"},
    {"dashboard"},
    {"main"},
    {"cli"},
]  # fmt: skip
ROOT_MODULES = LAYERS[0]
#: The server's modules that a worker may import; none imports a web framework or torch.
CONTRACT = ROOT_MODULES | {"models", "database", "files", "jobs"}


class Import(NamedTuple):
    """One imported module, and the line that a reader should look at."""

    module: str
    place: str

    @property
    def package(self) -> str:
        return self.module.split(".")[1]


def list_modules(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def list_imports(path: Path) -> Iterator[Import]:
    """All imports of a file, wherever they stand: under TYPE_CHECKING and in functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, place) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{place}: relative import"
            # `from server import jobs` names a package as `from server.jobs import queue` does.
            yield from (Import(f"{node.module}.{alias.name}", place) for alias in node.names)


def list_packages(path: Path) -> Iterator[Import]:
    return (entry for entry in list_imports(path) if entry.module.startswith("server."))


def find_layer(package: str) -> int:
    (layer,) = (index for index, packages in enumerate(LAYERS) if package in packages)
    return layer


def test_every_package_of_the_server_has_a_layer() -> None:
    packages = {path.stem for path in (ROOT / "server").iterdir() if path.suffix in ("", ".py")}
    assert packages - {"__init__", "__pycache__"} == set().union(*LAYERS)


def test_packages_import_only_what_lies_below_them() -> None:
    wrong = []
    for path in list_modules("server"):
        own_package = path.relative_to(ROOT / "server").parts[0].removesuffix(".py")
        if own_package == "__init__":
            continue
        for entry in list_packages(path):
            is_below = find_layer(entry.package) < find_layer(own_package)
            is_root = {entry.package, own_package} <= ROOT_MODULES
            if not (is_below or is_root or entry.package == own_package):
                wrong.append(f"{entry.place}: {own_package} imports {entry.module}")
    assert wrong == []


def test_worker_imports_only_the_contract_of_the_server() -> None:
    wrong = [
        f"{entry.place}: {entry.module}"
        for path in list_modules("worker")
        for entry in list_packages(path)
        if entry.package not in CONTRACT
    ]
    assert wrong == []


def test_server_imports_neither_worker_nor_torch() -> None:
    wrong = [
        f"{entry.place}: {entry.module}"
        for path in list_modules("server")
        for entry in list_imports(path)
        if entry.module.split(".")[0] in ("worker", "torch", "safetensors")
    ]
    assert wrong == []


def test_contract_imports_no_web_framework() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in list_modules("server")
        if path.relative_to(ROOT / "server").parts[0].removesuffix(".py") in CONTRACT
        and "migrations" not in path.parts
    ]
    assert len(modules) > 20
    check = f"import sys, {', '.join(modules)}; sys.exit('fastapi' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_packages_have_empty_init_files() -> None:
    filled = [path for path in list_modules("server", "worker") if path.name == "__init__.py"]
    assert [path for path in filled if path.read_text()] == []


@pytest.mark.parametrize(
    "word", ["pickle.load", "weights_only=False", "allow_pickle=True", "yaml.load"]
)
def test_nothing_is_unpickled(word: str) -> None:
    paths = list_modules("server", "worker")
    assert [path for path in paths if word in path.read_text()] == []


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda p: p.stem)
def test_every_benchmark_finds_what_it_measures(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else runs most of them."""
    monkeypatch.syspath_prepend(str(ROOT))
    importlib.import_module(f"benchmarks.{path.stem}")
