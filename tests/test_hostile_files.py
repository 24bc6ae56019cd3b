"""Malicious files, uploaded or replaced on disk, are refused and change nothing."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from conftest import TINY, MakeSettings, copy_settings, drain, queue_job
from fastapi.testclient import TestClient
from npz_files import GRIDS, HOSTILE, make_npz
from sqlalchemy import Engine
from sqlmodel import Session, select
from stored_state import read_state

from server.database.engine import open_database
from server.files.artifacts import JobFiles
from server.jobs import queue
from server.models.configuration import resolve_config
from server.models.options import OPTIONS, BuiltInOption
from server.models.tables import Artifact, JobStatus
from server.settings import Settings


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_data_set_is_refused_and_leaves_nothing(
    client: TestClient, engine: Engine, settings: Settings, tmp_path: Path, kind: str
) -> None:
    client.put("/datasets/mine", content=make_npz(images=GRIDS)).raise_for_status()
    before = read_state(engine, settings)
    answer = client.put("/datasets/other", content=HOSTILE[kind])
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert len(answer.content) < 2000
    assert str(settings.data_dir) not in answer.text
    assert read_state(engine, settings) == before
    assert client.post("/jobs", json={"option": "b", "dataset": "other"}).status_code == 422
    assert not Path("unpickled").exists()


# The operator's own files may be large.
@pytest.mark.parametrize("kind", sorted(HOSTILE.keys() - {"bomb of gigabytes"}))
def test_hostile_file_in_the_folder_can_be_used_by_no_job(
    client: TestClient, engine: Engine, settings: Settings, kind: str
) -> None:
    settings.datasets_dir.mkdir()
    (settings.datasets_dir / "other.npz").write_bytes(HOSTILE[kind])
    before = read_state(engine, settings)
    assert client.post("/jobs", json={"option": "b", "dataset": "other"}).status_code == 422
    for path in ("/datasets/other", "/datasets/other/preview.png"):
        assert client.get(path).status_code in (404, 422)
    assert [entry["name"] for entry in client.get("/datasets").json()["data"]][-1] == "other"
    assert read_state(engine, settings) == before
    assert not Path("unpickled").exists()


def test_file_that_turns_hostile_after_the_job_was_posted_fails_it(
    client: TestClient, engine: Engine, settings: Settings, write_npz: Callable[..., str]
) -> None:
    name = write_npz(images=GRIDS)
    job_id = client.post("/jobs", json={"option": "b", "dataset": name}).json()["id"]
    (settings.datasets_dir / f"{name}.npz").write_bytes(HOSTILE["array of objects"])
    drain(settings, engine)
    job = client.get(f"/jobs/{job_id}").json()
    assert (job["status"], job["failure_kind"]) == ("failed", "user")
    assert "Python objects" in job["error"]["message"]
    assert not Path("unpickled").exists()


def test_link_among_the_data_sets_is_none(client: TestClient, settings: Settings) -> None:
    secret = settings.data_dir / "secret.npz"
    secret.write_bytes(make_npz(images=GRIDS))
    settings.datasets_dir.mkdir()
    (settings.datasets_dir / "link.npz").symlink_to(secret)
    (settings.datasets_dir / "folder.npz").mkdir()
    os.mkfifo(settings.datasets_dir / "pipe.npz")
    names = [entry["name"] for entry in client.get("/datasets").json()["data"]]
    assert names == ["atomic", "arc"]
    for name in ("link", "folder", "pipe"):
        assert client.get(f"/datasets/{name}").status_code == 404
        assert client.delete(f"/datasets/{name}").status_code == 404
        assert client.post("/jobs", json={"option": "b", "dataset": name}).status_code == 422
    assert secret.exists()


def test_upload_does_not_follow_a_link_in_its_place(client: TestClient, settings: Settings) -> None:
    target = settings.data_dir / "precious"
    target.write_bytes(b"precious")
    settings.datasets_dir.mkdir()
    (settings.datasets_dir / "mine.npz").symlink_to(target)
    answer = client.put("/datasets/mine", content=make_npz(images=GRIDS))
    assert answer.status_code == 409
    assert target.read_bytes() == b"precious"


class Original(NamedTuple):
    """A data directory to be copied, and the job that ran there."""

    settings: Settings
    job_id: str


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, make_settings: MakeSettings) -> Original:
    settings = make_settings(tmp_path_factory.mktemp("original") / "experiments", retry_seconds=0.1)
    engine = open_database(settings)
    config = resolve_config(OPTIONS[BuiltInOption.b].config, overrides=TINY | {"epochs": 2})
    job = queue_job(engine, option=BuiltInOption.b, config=config)
    drain(settings, engine)
    engine.dispose()
    return Original(settings, job.id)


@pytest.fixture
def settings(
    tmp_path: Path, make_settings: MakeSettings, request: pytest.FixtureRequest
) -> Settings:
    if "ran" in request.fixturenames:
        original: Original = request.getfixturevalue("original")
        return copy_settings(original.settings, tmp_path / "experiments")
    return make_settings(tmp_path / "experiments", retry_seconds=0.1)


@pytest.fixture
def ran(original: Original) -> str:
    """The id of a job that has run for two epochs."""
    return original.job_id


def list_urls(client: TestClient, job_id: str) -> list[str]:
    """Each route to the files of the second epoch."""
    checkpoints = client.get(f"/jobs/{job_id}/checkpoints").json()["data"]
    pictures = client.get(f"/jobs/{job_id}/reconstructions").json()["data"]
    return [
        *(checkpoints[-1]["url"], f"/jobs/{job_id}/checkpoints/latest"),
        *(pictures[-1]["url"], f"/jobs/{job_id}/reconstructions/latest.png"),
    ]


def find_paths(settings: Settings, engine: Engine, job_id: str) -> list[Path]:
    """The files of the second epoch."""
    files = JobFiles(settings.runs_dir, job_id)
    with Session(engine) as session:
        rows = session.exec(select(Artifact).where(Artifact.job_id == job_id, Artifact.epoch == 2))
        return [files.path(row.file_name) for row in rows]


def link_outwards(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(content)
    # As if nothing had happened.
    os.utime(path, ns=times)


def become_a_pickle(path: Path) -> None:
    path.write_bytes(HOSTILE["pickle"])


def become_another_epoch(path: Path) -> None:
    shutil.copy(path.with_name(path.name.replace("epoch_2", "epoch_1")), path)


@pytest.mark.parametrize(
    "replace",
    [
        *(link_outwards, link_to_itself, become_a_folder),
        *(change_a_byte, become_a_pickle, become_another_epoch),
    ],
)
def test_file_that_was_replaced_on_disk_is_not_given_out(
    client: TestClient,
    settings: Settings,
    engine: Engine,
    ran: str,
    replace: Callable[[Path], None],
) -> None:
    urls = list_urls(client, ran)
    for url in urls:
        assert client.get(url).status_code == 200
    for path in find_paths(settings, engine, ran):
        replace(path)
    before = client.get(f"/jobs/{ran}").json()
    for url in urls:
        answer = client.get(url)
        assert answer.status_code == 404, url
        assert answer.headers["content-type"] == "application/problem+json"
        assert "root:" not in answer.text
    assert client.get(f"/comparisons/report.html?job_id={ran}").status_code == 200
    assert client.get(f"/jobs/{ran}").json() == before
    assert client.get(f"/jobs/{ran}/checkpoints/1").status_code == 200


@pytest.mark.parametrize("replace", [link_outwards, change_a_byte, become_a_pickle])
def test_job_whose_newest_checkpoint_was_replaced_goes_on_from_the_one_before(
    client: TestClient,
    settings: Settings,
    engine: Engine,
    ran: str,
    replace: Callable[[Path], None],
) -> None:
    for path in find_paths(settings, engine, ran):
        replace(path)
    queue.resume(engine, ran, num_epochs=3)
    drain(settings, engine)
    job = client.get(f"/jobs/{ran}").json()
    assert (job["status"], job["epochs_completed"]) == (JobStatus.succeeded, 3)
    assert "resumed after epoch 1" in client.get(f"/jobs/{ran}/log").text
    assert not Path("unpickled").exists()


def test_folder_of_a_job_that_is_a_link_is_not_emptied(
    client: TestClient, settings: Settings, ran: str
) -> None:
    folder, elsewhere = settings.runs_dir / ran, settings.data_dir.parent / "elsewhere"
    shutil.rmtree(folder)
    (elsewhere / "checkpoints").mkdir(parents=True)
    (elsewhere / "checkpoints" / "precious").write_bytes(b"precious")
    folder.symlink_to(elsewhere)
    assert client.delete(f"/jobs/{ran}").status_code == 204
    assert not folder.is_symlink()
    assert (elsewhere / "checkpoints" / "precious").read_bytes() == b"precious"


@pytest.mark.parametrize("is_folder", [False, True])
def test_log_that_is_a_link_is_not_read(
    client: TestClient, settings: Settings, ran: str, is_folder: bool
) -> None:
    folder, elsewhere = settings.runs_dir / ran, settings.data_dir.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "job.log").write_text("a secret of this machine")
    link, target = (folder, elsewhere) if is_folder else (folder / "job.log", elsewhere / "job.log")
    if is_folder:
        shutil.rmtree(folder)
    else:
        link.unlink()
    link.symlink_to(target)
    assert client.get(f"/jobs/{ran}/log").text == ""
    assert "a secret" not in client.get(f"/ui/jobs/{ran}").text


def test_preview_of_every_colour_is_a_picture(client: TestClient) -> None:
    grids = np.arange(640, dtype=np.uint8).reshape(10, 8, 8) % 10
    client.put("/datasets/mine", content=make_npz(images=grids)).raise_for_status()
    answer = client.get("/datasets/mine/preview.png")
    assert answer.content.startswith(b"\x89PNG")
    assert answer.headers["x-content-type-options"] == "nosniff"
