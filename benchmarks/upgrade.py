"""The upgrade of a database with many jobs, each with a configuration of its own.

Fills SQLite and the tests' own PostgreSQL as the version before has left them, opens each, prints a
table and writes `results/upgrade.json`. It takes about a minute on two cores:

    python -m benchmarks.upgrade
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, MetaData, Table, insert
from sqlmodel import create_engine

from benchmarks.machine import REPOSITORY, describe_machine, write_results
from server.database.engine import open_database
from server.database.schema import SCHEMA_REVISION, upgrade
from server.models.configuration import EARLIER_VALUES
from server.settings import Settings

OLD_REVISION = "0005"
TARGET_SECONDS = 10.0
PACKAGES = ("losslab", "sqlalchemy", "alembic", "psycopg")

sys.path.insert(0, str(REPOSITORY / "tests"))
import many_jobs  # noqa: E402 - the tests' own data
import postgres  # noqa: E402 - and their own server


def main() -> None:
    arguments = parse_arguments()
    results = describe_machine(PACKAGES) | {
        "revisions": [OLD_REVISION, SCHEMA_REVISION],
        "num_jobs": arguments.num_jobs,
        "target_seconds": TARGET_SECONDS,
    }
    with tempfile.TemporaryDirectory() as folder, postgres.Postgres() as server:
        for name in ("sqlite", "postgresql"):
            seconds = []
            for number in range(arguments.rounds):
                url = server.create_database() if name == "postgresql" else ""
                data_dir = Path(folder) / f"{name}_{number}"
                settings = Settings(data_dir=data_dir, database_url=url)
                seconds.append(time_upgrade(settings, num_jobs=arguments.num_jobs))
            results[name] = summarise(seconds)
            print(f"{name}: {results[name]}")
    if not arguments.no_write:
        write_results("upgrade", results)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num-jobs", type=int, default=30_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-write", action="store_true", help="print the table only")
    return parser.parse_args()


def time_upgrade(settings: Settings, *, num_jobs: int) -> float:
    settings.data_dir.mkdir(parents=True)
    engine = create_engine(settings.resolved_database_url)
    with engine.begin() as connection:
        upgrade(connection, revision=OLD_REVISION)
        fill(connection, num_jobs=num_jobs)
    engine.dispose()
    begin = time.perf_counter()
    open_database(settings).dispose()
    return time.perf_counter() - begin


def fill(connection: Connection, *, num_jobs: int) -> None:
    table = Table("job", MetaData(), autoload_with=connection)
    names = set(table.columns.keys())
    rows = [
        {name: value for name, value in job.items() if name in names}
        for job in make_jobs(num_jobs=num_jobs)
    ]
    connection.execute(insert(table), rows)


def make_jobs(*, num_jobs: int) -> Iterator[dict[str, Any]]:
    chance = random.Random(0)
    for number in range(num_jobs):
        job = many_jobs.make_job(chance, number, num_jobs=num_jobs, num_epochs=50)
        config = job["config"] | {"beta": number / num_jobs}
        for name in ("data_seed", *EARLIER_VALUES):
            del config[name]
        yield {"is_pinned": False, "num_requeues": 0} | job | {"config": config}


def summarise(seconds: list[float]) -> dict[str, float]:
    return {
        "median_seconds": round(statistics.median(seconds), 2),
        "slowest_seconds": round(max(seconds), 2),
    }


if __name__ == "__main__":
    main()
