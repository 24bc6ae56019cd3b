"""Uploaded data sets: upload, description and deletion."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY, drain, open_client
from fastapi.testclient import TestClient
from httpx2 import Response
from npz_files import GRIDS, HOSTILE, make_npy, make_npz
from PIL import Image
from sqlalchemy import Engine
from stored_state import read_state

from server.files.datasets import PALETTE, DatasetError, read_file
from server.main import create_app
from server.settings import Settings

HALF_RED = np.zeros((40, 8, 8), dtype=np.uint8)
HALF_RED[:, :4] = 2
CONTENT = make_npz(images=HALF_RED)


def put(client: TestClient, name: str = "mine", content: bytes = CONTENT) -> Response:
    return client.put(f"/datasets/{name}", content=content)


def list_names(client: TestClient, **query: Any) -> list[str]:
    page = client.get("/datasets", params=query).raise_for_status().json()
    return [dataset["name"] for dataset in page["data"]]


def test_data_set_that_was_brought_is_listed_after_those_built_in(client: TestClient) -> None:
    assert list_names(client) == ["atomic", "arc"]
    for name in ("b", "a"):
        put(client, name).raise_for_status()
    assert list_names(client) == ["atomic", "arc", "a", "b"]


def test_data_sets_are_listed_page_by_page(client: TestClient) -> None:
    for name in "abc":
        put(client, name).raise_for_status()
    page = client.get("/datasets", params={"limit": 2}).json()
    assert page["has_more"]
    last = page["data"][-1]["name"]
    rest = client.get("/datasets", params={"limit": 2, "after": last}).json()
    assert [dataset["name"] for dataset in page["data"] + rest["data"]][2:] == ["a", "b", "c"]
    assert not rest["has_more"]


def test_data_set_is_described_by_what_is_in_it(client: TestClient) -> None:
    answer = put(client)
    assert (answer.status_code, answer.headers["location"]) == (201, "/datasets/mine")
    shown = client.get("/datasets/mine").raise_for_status().json()
    assert shown == answer.json()
    assert (shown["num_grids"], shown["grid_size"]) == ({"images": 40}, 8)
    assert shown["colour_counts"] == [1280, 0, 1280, 0, 0, 0, 0, 0, 0, 0]
    assert shown["background_share"] == 0.5
    assert shown["size_bytes"] == len(CONTENT)


def test_preview_shows_the_grids_and_is_not_sent_twice(client: TestClient) -> None:
    url = put(client).json()["preview_url"]
    answer = client.get(url).raise_for_status()
    pixels = np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGB"))
    shown = set(map(tuple, pixels.reshape(-1, 3).tolist()))
    assert shown >= set(map(tuple, PALETTE[[0, 2]].tolist()))
    again = client.get(url, headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_same_file_again_is_welcome(client: TestClient) -> None:
    first = put(client)
    again = put(client)
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json()


def test_data_set_is_never_replaced(client: TestClient, engine: Engine, settings: Settings) -> None:
    put(client).raise_for_status()
    before = read_state(engine, settings)
    answer = put(client, content=make_npz(images=HALF_RED + 1))
    assert answer.status_code == 409
    assert read_state(engine, settings) == before


@pytest.mark.parametrize("name", ["atomic", "arc"])
def test_built_in_names_are_taken(client: TestClient, name: str) -> None:
    assert put(client, name).status_code == 409
    assert client.delete(f"/datasets/{name}").status_code == 409
    assert client.get(f"/datasets/{name}").json()["is_built_in"]
    assert client.get(f"/datasets/{name}/preview.png").status_code == 404


@pytest.fixture
def narrow(settings: Settings) -> Iterator[TestClient]:
    """A service that takes two kilobytes at most."""
    small = settings.model_copy(update={"max_upload_bytes": 2048})
    with open_client(create_app(small)) as client:
        yield client


def test_upload_beyond_the_limit_is_refused_and_leaves_nothing(
    narrow: TestClient, engine: Engine, settings: Settings
) -> None:
    before = read_state(engine, settings)
    answer = put(narrow)
    assert answer.status_code == 413
    assert "2048" in answer.json()["detail"]
    assert read_state(engine, settings) == before
    assert list_names(narrow) == ["atomic", "arc"]


def test_job_without_its_data_set_is_not_resumed(
    client: TestClient, settings: Settings, engine: Engine
) -> None:
    client.put("/datasets/mine", content=make_npz(images=GRIDS)).raise_for_status()
    url = f"/jobs/{client.post('/jobs', json={'option': 'b', 'dataset': 'mine'}).json()['id']}"
    client.post(f"{url}/cancel")
    client.delete("/datasets/mine").raise_for_status()
    refused = client.post(f"{url}/resume")
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["field"] == "dataset"
    assert client.get(url).json()["status"] == "cancelled"


def test_data_set_that_a_job_needs_stays(
    client: TestClient, engine: Engine, settings: Settings
) -> None:
    put(client).raise_for_status()
    job = client.post("/jobs", json={"option": "b", "dataset": "mine", **TINY}).json()
    answer = client.delete("/datasets/mine")
    assert answer.status_code == 409
    assert job["id"] in answer.json()["detail"]
    drain(settings, engine)
    ended = client.get(f"/jobs/{job['id']}").json()
    assert (ended["status"], ended["error"]) == ("succeeded", None)
    assert client.delete("/datasets/mine").status_code == 204
    assert list_names(client) == ["atomic", "arc"]
    assert client.get("/datasets/mine").status_code == 404
    assert client.delete("/datasets/mine").status_code == 404
    refused = client.post("/jobs", json={"option": "b", "dataset": "mine"})
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["field"] == "dataset"


def test_splits_of_their_own_are_counted_one_by_one(client: TestClient) -> None:
    splits = {name: HALF_RED[:size] for name, size in (("train", 30), ("val", 6), ("test", 4))}
    shown = put(client, content=make_npz(**splits)).raise_for_status().json()
    assert shown["num_grids"] == {"train": 30, "val": 6, "test": 4}
    assert shown["background_share"] == 0.5


def test_overlap_of_the_splits_of_a_file_is_told(client: TestClient) -> None:
    grids = np.random.default_rng(0).integers(0, 10, (60, 8, 8), dtype=np.int64)
    train, new = grids[:40], grids[40:]
    val = np.concatenate([new[:5], train[:2], np.rot90(train[2:5], axes=(1, 2))])
    shown = put(client, content=make_npz(train=train, val=val, test=new[5:])).json()
    assert shown["overlap"] == {
        "val": {"exact": 2, "by_orbit": 5},
        "test": {"exact": 0, "by_orbit": 0},
    }
    assert client.get("/datasets/mine").json()["overlap"] == shown["overlap"]


def test_repeated_grids_of_a_file_that_jobs_split_are_told(client: TestClient) -> None:
    grids = np.random.default_rng(0).integers(0, 10, (60, 8, 8), dtype=np.uint8)
    images = np.concatenate([grids, grids[:3], grids[5:9].transpose(0, 2, 1)])
    shown = put(client, content=make_npz(images=images)).json()
    assert shown["overlap"] == {"images": {"exact": 3, "by_orbit": 7}}
    assert client.get("/datasets/atomic").json()["overlap"] is None


def test_file_that_is_gone_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"gone\.npz is no readable \.npz file"):
        read_file(tmp_path / "gone.npz")


def test_upload_ends_up_as_one_file(client: TestClient, settings: Settings) -> None:
    put(client).raise_for_status()
    assert put(client, "broken", CONTENT[:500]).status_code == 422
    assert [path.name for path in Path(settings.datasets_dir).iterdir()] == ["mine.npz"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no readable .npz"),
        (b"not a zip", "no readable .npz"),
        (make_npy("{}"), "numpy.savez(file, images=array)"),
        (make_npz(images=GRIDS)[:300], "no readable .npz"),
        (make_npz(images=GRIDS + 10), "values from 10 to 10; colours are 0 to 9"),
        (make_npz(images=GRIDS.astype(np.int64) - 1), "values from -1 to -1"),
        (make_npz(images=GRIDS.astype(np.float32)), "integer dtype"),
        (make_npz(images=np.array([[[{}] * 4] * 4] * 10, dtype=object)), "Python objects"),
        (make_npz(images=GRIDS[0]), "shape (8, 8)"),
        (make_npz(images=GRIDS[:5]), "10 or more"),
        (make_npz(images=np.zeros((20, 8, 12), dtype=np.uint8)), "square"),
        (make_npz(images=np.zeros((20, 6, 6), dtype=np.uint8)), "divisible by 4"),
        (make_npz(images=np.zeros((20, 36, 36), dtype=np.uint8)), "at most 32"),
        (make_npz(train=GRIDS, val=GRIDS), "train, val and test, or images"),
        (
            make_npz(train=GRIDS, val=GRIDS, test=np.zeros((9, 4, 4), dtype=np.int8)),
            "one grid size",
        ),
        (make_npz(other=GRIDS), "it has ['other']"),
        (HOSTILE["terabyte by the header"], "does not hold"),
    ],
)
def test_unusable_data_set_is_refused_and_named(
    client: TestClient, settings: Settings, content: bytes, words: str
) -> None:
    settings.datasets_dir.mkdir(parents=True)
    (settings.datasets_dir / "mine.npz").write_bytes(content)
    refused = client.post("/jobs", json={"option": "b", "dataset": "mine"})
    assert refused.status_code == 422
    answer = refused.json()
    assert [error["field"] for error in answer["errors"]] == ["dataset"]
    assert "mine.npz" in answer["detail"]
    assert words in answer["detail"]
    assert client.get("/jobs").json()["data"] == []


def test_good_data_set_is_accepted(client: TestClient, write_npz: Callable[..., str]) -> None:
    name = write_npz(images=np.zeros((20, 8, 8), dtype=np.int64))
    assert client.post("/jobs", json={"option": "b", "dataset": name}).status_code == 201
