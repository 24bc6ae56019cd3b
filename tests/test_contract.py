"""Thousands of valid and invalid requests to a real server match the API's description."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import TINY, drain
from prometheus_client.parser import text_string_to_metric_families
from service import Service

from server.database.engine import open_database
from server.settings import Settings

pytestmark = pytest.mark.slow

TOKEN = "a-long-and-secret-token"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
DATASET = "noise"
NUM_EXAMPLES = 2000
TESTS = Path(__file__).parent
SCHEMATHESIS = str(Path(sys.executable).with_name("schemathesis"))
Json = dict[str, Any]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A server that needs a token and has finished jobs."""
    service = Service(tmp_path_factory.mktemp("contract"), token=TOKEN)
    service.environment = {"LOSSLAB_RATE_LIMIT": "1000000/second"}
    service.start("server")
    service.datasets_dir.mkdir()
    grids = np.random.default_rng(0).integers(0, 10, (40, 8, 8), dtype=np.uint8)
    np.savez(service.datasets_dir / f"{DATASET}.npz", images=grids)
    yield service
    service.stop("server")


@pytest.fixture(scope="module")
def study_id(service: Service) -> str:
    """Trained together with the jobs."""
    study = service.post(
        "/studies", options=["a", "b"], num_seeds=2, config=TINY | {"dataset": DATASET}
    )
    return str(study["id"])


@pytest.fixture(scope="module")
def job_ids(service: Service, study_id: str) -> list[str]:
    ids = [service.train(option, dataset=DATASET)["id"] for option in "abc"]
    settings = Settings(data_dir=service.data_dir, poll_seconds=0.02)
    engine = open_database(settings)
    drain(settings, engine)
    engine.dispose()
    return ids


@pytest.fixture(scope="module")
def report(
    service: Service,
    job_ids: list[str],
    study_id: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Json:
    """The results of schemathesis with all of its checks."""
    directory = tmp_path_factory.mktemp("schemathesis")
    command = [
        *(SCHEMATHESIS, "--config-file", str(TESTS / "schemathesis.toml")),
        *("run", f"{service.url}/openapi.json", "--checks", "all"),
        *("--header", f"Authorization: {BEARER['Authorization']}"),
        *("--report", "json", "--report-json-path", str(directory / "report.json")),
    ]
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "CONTRACT_JOB_IDS": " ".join(job_ids)}
    environment |= {"CONTRACT_DATASET": DATASET, "CONTRACT_STUDY_ID": study_id}
    run = subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True)
    sys.stderr.write(run.stdout[-1500:])
    report: Json = json.loads((directory / "report.json").read_text())
    return report | {"output": run.stdout + run.stderr, "returncode": run.returncode}


def test_every_answer_is_as_described(report: Json) -> None:
    assert report["returncode"] == 0, report["output"]
    assert report["failures"] == []
    assert report["operations"]["tested"] == report["operations"]["total"]
    assert report["operations"]["total"] >= 30


def test_thousands_of_requests_were_sent_and_none_was_too_much(
    report: Json, service: Service
) -> None:
    assert report["test_cases"]["generated"] >= NUM_EXAMPLES
    counts = count_answers(service)
    assert sum(counts.values()) >= NUM_EXAMPLES
    assert {status for status in counts if status >= 500} == set()


def count_answers(service: Service) -> dict[int, int]:
    """By status, as the server itself counted them."""
    metrics = httpx.get(f"{service.url}/metrics", headers=BEARER).text
    counts: dict[int, int] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name == "losslab_request_seconds_count":
                status = int(sample.labels["status"])
                counts[status] = counts.get(status, 0) + int(sample.value)
    return counts
