"""Numbers that are not finite: the same null in every store, answer and page, with a reason."""

import json
import logging
import math
from typing import Any

import pytest
from conftest import BOTH_DATABASES, SubmitJob, open_client
from hypothesis import given
from hypothesis import strategies as st
from known_job import make_epoch
from sqlalchemy import JSON, Engine, Float
from sqlmodel import SQLModel

from server.finite import find_not_finite, make_finite
from server.jobs import queue, records
from server.jobs.leases import Lease
from server.logs import JsonFormatter
from server.main import create_app
from server.models.columns import FiniteFloat, FiniteJSON
from server.settings import Settings

NO_NUMBERS = (math.nan, math.inf, -math.inf)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON_VALUES)
def test_finite_value_is_strict_json_and_changes_nothing_else(value: Any) -> None:
    finite = make_finite(value)
    assert json.loads(json.dumps(finite, allow_nan=False)) == finite
    assert (finite == value) == (not find_not_finite({"value": value}))


def test_every_column_of_numbers_stores_finite_ones() -> None:
    for table in SQLModel.metadata.tables.values():
        for column in table.columns:
            if isinstance(column.type, Float | FiniteFloat):
                assert isinstance(column.type, FiniteFloat), column
            if isinstance(column.type, JSON | FiniteJSON):
                assert isinstance(column.type, FiniteJSON), column


@BOTH_DATABASES
@pytest.mark.parametrize("value", NO_NUMBERS)
def test_value_that_is_not_finite_loses_no_epoch_and_is_null_with_a_reason(
    engine: Engine, settings: Settings, submit_job: SubmitJob, value: float
) -> None:
    claimed = queue.claim(engine, worker_id="w1", lease_seconds=600, job_id=submit_job(epochs=1).id)
    assert claimed is not None
    lease = Lease(claimed.id, claimed.attempt, "w1")
    metrics = make_epoch(lease, 1)
    metrics.max_spike_ratio = metrics.val_foreground_ap = value
    metrics.val_recall_per_colour = [0.5, value]
    records.record_epoch(
        engine, lease, metrics, publish=list, resume_point=None, best_by=(), progress=1.0
    )
    with open_client(create_app(settings)) as client:
        (row,) = client.get(f"/jobs/{lease.job_id}/metrics").json()["data"]
        events = client.get(f"/jobs/{lease.job_id}/events").json()["data"]
        assert "NaN" not in client.get("/metrics").text
    assert row["max_spike_ratio"] is row["val_foreground_ap"] is None
    assert row["val_recall_per_colour"] == [0.5, None]
    values, warning = events[-2:]
    assert values["data"]["max_spike_ratio"] is None
    assert warning["message"] == (
        "epoch 1: stored as null, as not finite: max_spike_ratio, val_recall_per_colour, "
        "val_foreground_ap"
    )


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_line_of_the_log_is_strict_json(value: float) -> None:
    record = logging.makeLogRecord({"msg": "loss", "values": {"loss": value}})
    entry = json.loads(JsonFormatter().format(record), parse_constant=pytest.fail)
    assert entry["loss"] is None
