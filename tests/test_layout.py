"""Who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What both sides may use: no web framework and no torch in any of it.
CONTRACT = {
    "settings",
    "models",
    "columns",
    "database",
    "job_queue",
    "job_records",
    "leases",
    "reaper",
    "job_events",
    "worker_registry",
    "artifacts",
    "datasets",
    "logs",
    "tokens",
}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_worker_imports_only_the_contract_of_the_server() -> None:
    for path in (ROOT / "worker").rglob("*.py"):
        used = {name.split(".")[1] for name in imports(path) if name.startswith("server.")}
        assert used <= CONTRACT, path


def test_server_imports_neither_worker_nor_torch() -> None:
    for path in (ROOT / "server").rglob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & {"worker", "torch", "safetensors"}, path


@pytest.mark.parametrize("module", sorted(CONTRACT))
def test_contract_imports_no_web_framework(module: str) -> None:
    check = f"import sys, server.{module}; sys.exit('fastapi' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_nothing_is_unpickled() -> None:
    for folder in ("server", "worker"):
        for path in (ROOT / folder).rglob("*.py"):
            source = path.read_text()
            for word in ("pickle.load", "weights_only=False", "allow_pickle=True", "yaml.load"):
                assert word not in source, path
