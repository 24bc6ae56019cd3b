"""A minute of `benchmarks.chaos` on each database."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
NUM_INVARIANTS = 10


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_invariants_hold_whatever_breaks(database: str) -> None:
    # A longer lease than a machine needs that does nothing else.
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.chaos", "--minutes", "1", "--lease-seconds", "6",
         "--workers", "2", "--database", database, "--seed", "7"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    lines = run.stdout.splitlines()
    assert sum(line.startswith("holds ") for line in lines) == NUM_INVARIANTS, run.stdout
