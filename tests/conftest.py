"""Real SQLite files, tiny real trainings, a real server; nothing of ours is replaced."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sqlalchemy import Engine

from server import job_queue
from server.database import open_database
from server.main import create_app
from server.models import Job, Option
from server.schemas import resolve_config
from server.settings import Settings
from worker.main import work

TINY = {"num_samples": 200, "epochs": 2, "batch_size": 32, "checkpoint_every": 1}

SubmitJob = Callable[..., Job]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "experiments", poll_seconds=0.02)


@pytest.fixture
def engine(settings: Settings) -> Iterator[Engine]:
    engine = open_database(settings)
    yield engine
    engine.dispose()


@pytest.fixture
def submit_job(engine: Engine) -> SubmitJob:
    """Queue a tiny job; keyword arguments override its configuration."""

    def submit(option: str = "b", *, priority: int = 0, **overrides: Any) -> Job:
        config = resolve_config(Option(option), quick_test=False, overrides=TINY | overrides)
        return job_queue.submit(engine, option=Option(option), config=config, priority=priority)

    return submit


@pytest.fixture
def app(settings: Settings) -> FastAPI:
    return create_app(settings)


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def drain(settings: Settings, engine: Engine) -> None:
    """Run every queued job in this process."""
    work(settings, engine=engine, shutdown=threading.Event(), is_drain=True)


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[TestClient, dict[str, str]]]:
    """A server on which options a, b and c have run, and their ids by option."""
    settings = Settings(data_dir=tmp_path_factory.mktemp("finished"))
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        ids = {
            option: client.post("/jobs", json={"option": option, "name": f"run {option}", **TINY})
            .raise_for_status()
            .json()["id"]
            for option in "abc"
        }
        engine = open_database(settings)
        drain(settings, engine)
        engine.dispose()
        yield client, ids


@pytest.fixture
def write_npz(settings: Settings) -> Callable[..., str]:
    """Write arrays to the data directory's datasets/ and return the data set's name."""

    def write(name: str = "mine", **arrays: np.ndarray) -> str:
        settings.datasets_dir.mkdir(parents=True, exist_ok=True)
        np.savez(settings.datasets_dir / f"{name}.npz", **arrays)
        return name

    return write
