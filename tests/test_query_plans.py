"""Queries of the routes on many jobs read about as many rows as they return."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import many_jobs
import pytest
from conftest import BOTH_DATABASES, MakeSettings, open_client
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Connection, Engine, text
from sqlmodel import Session, SQLModel, col, select
from statements import recording

from server.jobs import studies
from server.main import create_app
from server.models.tables import Job

pytestmark = BOTH_DATABASES

NUM_JOBS, NUM_EPOCHS, NUM_COMPARED = 4000, 5, 100
NUM_STUDIES, NUM_ARMS, NUM_SEEDS = 4000, 3, 1
#: A page of 100, or 100 jobs with their epochs, and the few that PostgreSQL may pass over.
MAX_ROWS_READ = 800

#: Requests by the index that holds the answer in its order.
LISTS = {
    "ix_job_created_at_id": ["", "after={middle}", "limit=100"],
    "ix_job_status_created_at": [
        "status=succeeded",
        "status=paused",
        "status=succeeded&after={middle}",
        "status=succeeded&status=failed",
        "status=queued&status=running&after={middle}",
    ],
    "ix_job_option_created_at": ["option=b", "option=b&after={middle}", "option=c"],
    "ix_job_option_status_created_at": [
        "option=b&status=succeeded",
        "option=b&status=succeeded&status=cancelled&after={middle}",
    ],
    "ix_job_name_created_at": ["name=baseline", "name=baseline&after={middle}", "name=nobody's"],
    "ix_job_label_created_at": [
        "metadata[study]=ablation",
        "metadata[study]=ablation&after={middle}",
        "metadata[study]=nobody's",
    ],
}
#: No single index has these in order; at most the rows of one filter are read.
COMBINATIONS = [
    "metadata[study]=ablation&metadata[owner]=ada",
    "metadata[study]=ablation&status=failed",
    "metadata[study]=study 1&option=b&name=baseline",
    "name=baseline&option=c&status=succeeded&status=failed",
]
JOB_PATHS = ("", "/metrics", "/verdict", "/events", "/reconstructions", "/checkpoints")
#: Without these, another index is nearly as good for the jobs of this test.
NEARLY_SPARED = {
    "sqlite": {"ix_job_option_status_created_at"},
    "postgresql": {
        "ix_job_option_status_created_at",
        "ix_job_option_created_at",
        "ix_job_status_created_at",
    },
}


class Store(NamedTuple):
    client: TestClient
    engine: Engine
    job_ids: list[str]  # the newest first
    study_ids: list[str]


class Plan(NamedTuple):
    """A database's query plan of a statement."""

    statement: str
    text: str
    flaws: list[str]


@pytest.fixture(scope="module", params=[False, True], ids=["fresh", "analyzed"])
def store(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    make_settings: MakeSettings,
    database: str,
) -> Iterator[Store]:
    """A server with thousands of jobs, with and without statistics in the database."""
    has_statistics = request.param
    if database == "postgresql" and not has_statistics:
        pytest.skip("it makes them by itself")
    app: FastAPI = create_app(make_settings(tmp_path_factory.mktemp("crowded")))
    with open_client(app) as client:
        engine: Engine = app.state.engine
        many_jobs.fill(engine, num_jobs=NUM_JOBS, num_epochs=NUM_EPOCHS)
        newest_first = select(Job.id).order_by(col(Job.created_at).desc(), col(Job.id).desc())
        with Session(engine) as session:
            job_ids = list(session.exec(newest_first))
        study_ids = many_jobs.fill_studies(
            engine, job_ids, num_studies=NUM_STUDIES, num_arms=NUM_ARMS, num_seeds=NUM_SEEDS
        )
        if has_statistics:
            analyze(engine)
        yield Store(client, engine, job_ids, study_ids)


def analyze(engine: Engine) -> None:
    statement = "VACUUM ANALYZE" if engine.dialect.name == "postgresql" else "ANALYZE"
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(statement))


def explain(store: Store, path: str) -> list[Plan]:
    """The plans of all statements that the server executes for a request."""
    return explain_all(store, lambda: store.client.get(path).raise_for_status())


def explain_all(store: Store, execute: Callable[[], object]) -> list[Plan]:
    with recording(store.engine) as statements:
        execute()
    read_plan = read_sqlite_plan if store.engine.dialect.name == "sqlite" else read_postgres_plan
    with store.engine.connect() as connection:
        plans = [read_plan(connection, *each) for each in statements if "SELECT" in each.text]
    assert plans
    return plans


def explain_list(store: Store, query: str) -> list[Plan]:
    return explain(store, "/jobs?" + query.replace("{middle}", store.job_ids[NUM_JOBS // 2]))


def read_sqlite_plan(connection: Connection, statement: str, parameters: Any) -> Plan:
    rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
    steps = [row.detail for row in rows]
    # All jobs in the order of an index are no scan, since their page soon ends. A subquery has
    # no more rows than pages, of which there is one for each status.
    is_filtered = " WHERE " in " ".join(statement.split())
    is_merge = "COMPOUND QUERY" in steps
    flaws = [
        step
        for step in steps
        if (step.startswith("USE TEMP B-TREE") and not is_merge)
        or (re.match(r"SCAN (?!anon_)", step) and (is_filtered or "USING" not in step))
    ]
    return Plan(statement, "\n".join(steps), flaws)


def read_postgres_plan(connection: Connection, statement: str, parameters: Any) -> Plan:
    """Count by running it, since the database may skip rows instead of using an index."""
    explanation = f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}"
    (plan,) = connection.exec_driver_sql(explanation, parameters).scalar_one()
    nodes = list(walk(plan["Plan"]))
    num_read = sum(count_rows_read(node) for node in nodes)
    flaws = [f"reads {node['Relation Name']}" for node in nodes if node["Node Type"] == "Seq Scan"]
    if num_read > MAX_ROWS_READ:
        flaws.append(f"reads {num_read} rows")
    steps = [node.get("Index Name", node["Node Type"]) for node in nodes]
    return Plan(statement, "\n".join(steps), flaws)


def walk(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in node.get("Plans", ()):
        yield from walk(child)


def count_rows_read(node: dict[str, Any]) -> int:
    if "Relation Name" not in node:
        return 0
    num_rows = node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
    return int(num_rows * node["Actual Loops"])


@contextmanager
def without(engine: Engine, index: str) -> Iterator[None]:
    """The database without one of its indices."""
    (known,) = [i for t in SQLModel.metadata.tables.values() for i in t.indexes if i.name == index]
    known.drop(engine)
    _forget_plans(engine)
    try:
        yield
    finally:
        known.create(engine)
        _forget_plans(engine)


def _forget_plans(engine: Engine) -> None:
    """SQLite's driver keeps statements, and with them their plans; PostgreSQL makes new plans.

    Disposing the engine while the server uses a connection would leave that one open.
    """
    if engine.dialect.name == "sqlite":
        engine.dispose()


def find_flaws(plans: list[Plan]) -> list[str]:
    return [flaw for plan in plans for flaw in plan.flaws]


@pytest.mark.parametrize(
    ("index", "query"), [(index, query) for index, queries in LISTS.items() for query in queries]
)
def test_list_reads_little_more_than_its_page(store: Store, index: str, query: str) -> None:
    plans = explain_list(store, query)
    assert find_flaws(plans) == [], plans
    # PostgreSQL may use another index and skip a few rows.
    assert index in plans[-1].text or store.engine.dialect.name == "postgresql"


@pytest.mark.parametrize("query", COMBINATIONS)
def test_filters_together_begin_with_what_one_of_them_has(store: Store, query: str) -> None:
    plans = explain_list(store, query)
    assert [flaw for flaw in find_flaws(plans) if not flaw.endswith(" rows")] == [], plans


@pytest.mark.parametrize("index", LISTS)
def test_list_without_its_index_reads_or_sorts_everything(store: Store, index: str) -> None:
    if index in NEARLY_SPARED[store.engine.dialect.name]:
        pytest.skip("others serve nearly as well")
    with without(store.engine, index):
        plans = [plan for query in LISTS[index] for plan in explain_list(store, query)]
    assert find_flaws(plans), plans


@pytest.mark.parametrize("path", JOB_PATHS)
def test_what_belongs_to_one_job_is_found_by_an_index(store: Store, path: str) -> None:
    plans = explain(store, f"/jobs/{store.job_ids[-1]}{path}")
    assert find_flaws(plans) == [], plans


@pytest.mark.parametrize("name", ["", "/report.md"])
def test_comparison_reads_the_epochs_of_its_jobs_alone(store: Store, name: str) -> None:
    ids = "&".join(f"job_id={job_id}" for job_id in store.job_ids[-NUM_COMPARED:])
    for query in (ids, "options=a,b,c"):
        plans = explain(store, f"/comparisons{name}?{query}")
        assert find_flaws(plans) == [], plans


@pytest.mark.parametrize("query", ["", "after={middle}"])
def test_list_of_studies_reads_little_more_than_its_page(store: Store, query: str) -> None:
    path = "/studies?" + query.replace("{middle}", store.study_ids[NUM_STUDIES // 2])
    plans = explain(store, path)
    # The jobs of a page are counted by status, which no index can have in order.
    flaws = [flaw for flaw in find_flaws(plans) if flaw != "USE TEMP B-TREE FOR GROUP BY"]
    assert flaws == [], plans


def test_list_of_studies_without_its_index_reads_or_sorts_everything(store: Store) -> None:
    with without(store.engine, "ix_study_created_at_id"):
        assert find_flaws(explain(store, "/studies")), "it is needed"


def test_study_reads_its_own_jobs_alone(store: Store) -> None:
    plans = explain(store, f"/studies/{store.study_ids[0]}")
    flaws = [flaw for flaw in find_flaws(plans) if flaw != "USE TEMP B-TREE FOR ORDER BY"]
    assert flaws == [], plans


def test_races_are_found_without_reading_other_studies(store: Store) -> None:
    with Session(store.engine) as session:
        plans = explain_all(store, lambda: studies.list_due_races(session))
    assert all("ix_study_racing" in plan.text for plan in plans), plans
