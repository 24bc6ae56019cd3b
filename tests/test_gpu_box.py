"""The script that measures a GPU box, rehearsed on this machine at toy size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_package import build_wheel

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu" / "run.sh"


def rehearse(wheels: Path, results: Path) -> subprocess.CompletedProcess[str]:
    names = {"PYTHON": sys.executable, "WHEELS": str(wheels), "RESULTS_DIR": str(results)}
    return subprocess.run(
        [SCRIPT], env=os.environ | names | {"REHEARSAL": "1"}, capture_output=True, text=True
    )


def test_every_part_runs_and_writes_its_results(tmp_path: Path) -> None:
    results = tmp_path / "results"
    done = rehearse(build_wheel(tmp_path).parent, results)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all parts ended" in done.stdout
    found = {path.stem: json.loads(path.read_text()) for path in results.glob("*.json")}
    assert found.keys() == {"gpu_service", "gpu_slots", "gpu_training"}
    assert [row["runs"] for row in found["gpu_slots"]["rows"]] == [1, 1, 2]
    assert all(row["equal_to_each_alone"] for row in found["gpu_slots"]["rows"])
    assert found["gpu_service"]["study"]["num_jobs"] == 4


def test_missing_wheels_are_named_before_anything_starts(tmp_path: Path) -> None:
    done = rehearse(tmp_path, tmp_path / "results")
    assert done.returncode == 2
    assert f"missing in {tmp_path}: losslab; benchmarks/gpu/wheels.sh collects them" in done.stderr
    assert "== install" not in done.stdout
