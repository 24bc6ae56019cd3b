"""Processes under a shim of `tests/shims`: a library that answers some system calls otherwise."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest

ROOT = Path(__file__).parent.parent
_SOURCES_DIR = Path(__file__).parent / "shims"


@cache
def _make_folder() -> Path:
    return Path(mkdtemp(prefix="losslab-shims-"))


@cache
def build_shim(name: str) -> Path:
    """Compile a shim. Skips the test without a C compiler, or on another system."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("the shims need Linux and a C compiler (cc)")
    library = _make_folder() / f"{name}.so"
    source = _SOURCES_DIR / f"{name}.c"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl", "-lm"], check=True
    )
    return library


def start_under(
    shim: str, *arguments: str, environment: Mapping[str, str], log_path: Path
) -> subprocess.Popen[bytes]:
    """Start Python with these arguments; its output goes to the log."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("LOSSLAB_")}
    preloaded = {"LD_PRELOAD": str(build_shim(shim)), "OMP_NUM_THREADS": "1"}
    with log_path.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, *arguments],
            env=clean | preloaded | dict(environment),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
