"""Names that cannot be: told in words what they may be, and which name was probably meant."""

import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import open_client
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from npz_files import GRIDS, make_npz
from pydantic import ValidationError

from server.main import create_app
from server.models.names import is_name, suggest_name
from server.settings import Settings

CONTENT = make_npz(images=GRIDS)
#: What only a regular expression has.
EXPRESSION = ("[A-Za-z", "^[", "[^", "{0,63}", "[!-~]", "(second|")


def has_expression(text: str) -> bool:
    return any(part in text for part in EXPRESSION)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("ok.npz", "ok"),
        ("folder/ok.npz", "ok"),
        ("C:\\data\\My Grids.NPZ", "My-Grids"),
        ("re-arc.v1", "re-arc-v1"),
        ("x" * 99, "x" * 64),
        ("_hidden", "hidden"),
        ("漢字", None),
        ("..", None),
    ],
)
def test_name_of_a_file_is_told_the_name_that_is_meant(
    client: TestClient, name: str, meant: str | None
) -> None:
    assert suggest_name(name) == meant
    for answer in (
        client.post("/jobs", json={"option": "b", "dataset": name}),
        client.post("/studies", json={"options": ["a", "b"], "config": {"dataset": name}}),
        client.put(f"/datasets/{name.replace('/', '%2F')}", content=CONTENT),
    ):
        assert answer.status_code in (404, 405, 422)
        assert not has_expression(answer.text)
        if answer.status_code == 422:
            assert "letters from A to Z, digits, _ and -" in answer.json()["detail"]
            assert meant is None or f"did you mean {meant}?" in answer.json()["detail"]


@given(st.text())
def test_what_is_suggested_is_a_name(text: str) -> None:
    name = suggest_name(text)
    assert name is None or (is_name(name) and name != text)


@pytest.mark.parametrize(
    ("body", "headers", "words"),
    [
        ({"option": "b", "name": "a\nb"}, {}, "one line"),
        ({"option": "b", "metadata": {"k": "a\0b"}}, {}, "without NUL"),
        ({"option": "b", "metadata": {"\0": "a"}}, {}, "without NUL"),
        ({"option": "b.npz"}, {}, "did you mean b?"),
        ({"option": "b"}, {"Idempotency-Key": "a key"}, "without spaces"),
    ],
)
def test_other_texts_are_told_what_they_may_be(
    client: TestClient, body: dict[str, Any], headers: dict[str, str], words: str
) -> None:
    answer = client.post("/jobs", json=body, headers=headers)
    assert answer.status_code == 422
    assert words in answer.json()["detail"]
    assert not has_expression(answer.text)


def test_rate_that_is_none_is_told_what_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOSSLAB_RATE_LIMIT", "10 per minute")
    with pytest.raises(ValidationError) as raised:
        Settings()
    assert "/minute" in str(raised.value)
    assert not has_expression(str(raised.value))


def test_files_in_the_folder_that_are_left_out_are_named_with_the_reason(
    client: TestClient, settings: Settings
) -> None:
    folder = settings.datasets_dir
    folder.mkdir()
    for name in ("ok.npz", "re-arc.v1.npz", "My Grids.npz", "UPPER.NPZ", "arc.npz"):
        (folder / name).write_bytes(CONTENT)
    (folder / "task.json").write_text("{}")
    (folder / "notes.txt").write_text("text")
    (folder / ".upload.part").write_bytes(b"")
    (folder / "sub").mkdir()
    (folder / "link.npz").symlink_to(folder / "ok.npz")
    (folder / os.fsdecode(b"\xff\xfe.npz")).write_bytes(CONTENT)
    page = client.get("/datasets").json()
    assert [each["name"] for each in page["data"]] == ["atomic", "arc", "ok"]
    reasons = {each["file_name"]: each["reason"] for each in page["left_out"]}
    for name, words in {
        "re-arc.v1.npz": "re-arc-v1.npz",
        "My Grids.npz": "My-Grids.npz",
        "UPPER.NPZ": "rename it to UPPER.npz",
        "arc.npz": "built-in",
        "task.json": "losslab data import FILE --name task",
        "notes.txt": "no .npz file",
        "sub": "no file",
        "link.npz": "a link",
        "\ufffd\ufffd.npz": "a name has",
    }.items():
        assert words in reasons.pop(name)
    assert reasons == {}


def test_first_files_that_are_left_out_are_named_in_the_log_at_the_start(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    folder = settings.datasets_dir
    folder.mkdir()
    for number in range(9):
        (folder / f"v1.{number}.npz").write_bytes(CONTENT)
    with open_client(create_app(settings)), caplog.at_level(logging.WARNING, "server.upkeep"):
        deadline = time.monotonic() + 60
        while "4 other files" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "datasets/v1.0.npz is no data set: a name has 1 to 64 letters" in caplog.text
    assert "v1.5.npz" not in caplog.text
    assert "4 other files in datasets/ are no data sets either" in caplog.text


@pytest.mark.parametrize(("name", "file_name"), [("UPPER", "UPPER.NPZ"), ("v1-2", "v1.2.npz")])
def test_file_that_is_left_out_is_named_when_it_is_asked_for(
    client: TestClient, settings: Settings, name: str, file_name: str
) -> None:
    settings.datasets_dir.mkdir()
    Path(settings.datasets_dir, file_name).write_bytes(CONTENT)
    answer = client.post("/jobs", json={"option": "b", "dataset": name})
    assert answer.status_code == 422
    assert f"{file_name} lies in datasets/ and is left out" in answer.json()["detail"]


def test_list_of_known_data_sets_in_a_message_ends(client: TestClient, settings: Settings) -> None:
    settings.datasets_dir.mkdir()
    for number in range(200):
        (settings.datasets_dir / f"data-{number}.npz").write_bytes(b"")
    detail = client.get("/datasets/gone").json()["detail"]
    assert len(detail) < 1500
    assert "did you mean" not in detail
    assert "Did you mean data-7?" in client.get("/datasets/data-7.npz").json()["detail"]
