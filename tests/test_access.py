"""Paths and ports that cannot be used: one line with which, why, and what helps."""

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import forks
import httpx
import pytest
from commands import make_environment, wait_for
from conftest import open_client, problem
from fastapi import FastAPI
from npz_files import GRIDS, make_npz
from test_events import find_free_port

from server.cli.listener import StartError, open_listener
from server.database.engine import open_database
from server.environment.access import AccessError, check_writable, explain, prepare_folder
from server.settings import Settings

TRAIN = ["train", "--option", "b", "--num-samples", "200", "--epochs", "1"]


def call(*arguments: str, **environment: str) -> tuple[int, str]:
    """A command of a user who may not write anywhere: its exit code and what it said."""
    done = forks.run("weak", *arguments, environment=make_environment(**environment))
    return done.returncode, done.stdout + done.stderr


def assert_told(ended: tuple[int, str], *words: str) -> None:
    """One line, which has all of these words."""
    code, text = ended
    assert code in (1, 2), text
    assert "Traceback" not in text
    assert "[Errno" not in text
    plain = " ".join(text.replace("│", " ").split())
    for word in words:
        assert word in plain, text


@contextmanager
def closed(*paths: Path) -> Iterator[None]:
    """Folders and files that nobody may write to."""
    modes = {path: path.stat().st_mode for path in paths}
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A data directory as it is after use."""
    settings = Settings(data_dir=tmp_path / "lab")
    open_database(settings).dispose()
    for folder in settings.file_dirs:
        folder.mkdir()
    return settings.data_dir


#: `losslab worker` becomes another program, which imports PyTorch first, and is tried once.
COMMANDS = [["serve", "--port", "0"], ["up", "--port", "0"], TRAIN,
            ["quickstart", "--num-samples", "200"], ["study", "a", "--local"]]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_file_in_the_place_of_the_data_directory(tmp_path: Path, command: list[str]) -> None:
    file = tmp_path / "a-file"
    file.write_text("no folder")
    for path in (file, file / "below"):
        ended = call(*command, "--data-dir", str(path))
        assert_told(ended, f"{path}: a file is in the place of a folder", "name a folder")


@pytest.mark.parametrize(
    "command", [*COMMANDS, ["worker", "--drain"]], ids=lambda command: command[0]
)
def test_data_directory_that_may_not_be_made(tmp_path: Path, command: list[str]) -> None:
    with closed(tmp_path):
        ended = call(*command, "--data-dir", str(tmp_path / "lab"))
    assert_told(ended, f"{tmp_path / 'lab'}: user ", "may not use it", "name another place")


@pytest.mark.parametrize("command", [COMMANDS[0], TRAIN], ids=lambda command: command[0])
@pytest.mark.parametrize("name", ["", "runs", "datasets", "cache", "losslab.db"])
def test_part_of_the_data_directory_that_may_not_be_written(
    data_dir: Path, command: list[str], name: str
) -> None:
    with closed(data_dir / name):
        ended = call(*command, "--data-dir", str(data_dir))
    assert_told(ended, f"{data_dir / name}: user ", "may not use it")


def test_working_directory_that_may_not_be_written(tmp_path: Path) -> None:
    with closed(tmp_path):
        ended = call("serve", "--port", "0", TESTS_FOLDER=str(tmp_path))
    assert_told(ended, "experiments: user ", "may not use it")


def test_report_and_log_are_looked_at_before_anything_slow(tmp_path: Path) -> None:
    nobody = {"LOSSLAB_URL": f"http://127.0.0.1:{find_free_port()}"}
    folder = tmp_path / "closed"
    folder.mkdir()
    with closed(folder):
        for arguments in (
            ["compare", "--options", "a,b", "--report", str(folder / "x.html")],
            ["study", "report", "abc", "--output", str(folder / "x.html")],
            ["study", "a", "b", "--report", str(folder / "x.html")],
            [*TRAIN, "--log", str(folder / "x.log"), "--data-dir", str(tmp_path / "lab")],
        ):
            assert_told(call(*arguments, **nobody), "cannot be written", "may not use it")


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"no database" * 100, "no SQLite database"), (b"", "")],
)
def test_file_that_is_no_database(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.db"
    path.write_bytes(content)
    settings = Settings(data_dir=tmp_path, database_url=f"sqlite:///{path}")
    if not words:  # an empty file is a new database
        open_database(settings).dispose()
        return
    with pytest.raises(AccessError, match=words) as refused:
        open_database(settings)
    assert str(refused.value).startswith(f"{path}: ")


def test_folder_in_the_place_of_the_database(tmp_path: Path) -> None:
    (tmp_path / "losslab.db").mkdir()
    with pytest.raises(AccessError, match="the database cannot be opened") as refused:
        open_database(Settings(data_dir=tmp_path))
    assert str(tmp_path / "losslab.db") in str(refused.value)


def test_database_in_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/new/folder/x.db"
    open_database(Settings(data_dir=tmp_path / "lab", database_url=url)).dispose()
    assert (tmp_path / "new/folder/x.db").exists()


def test_secret_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "losslab_api_token"
    path.write_text("x")
    path.chmod(0)
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import weak\n"
        "from server.settings import Settings; from server.messages import describe_error\n"
        "weak.give_up_rights()\n"
        f"try: Settings(_secrets_dir={str(tmp_path)!r})\n"
        "except ValueError as error: sys.exit(describe_error(error))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert_told((done.returncode, done.stderr), f"{path}: user ", "may not use it")


# -- a running server


@contextmanager
def serving(data_dir: Path) -> Iterator[str]:
    """The address of a server of a user who may not write anywhere."""
    port = find_free_port()
    environment = make_environment(LOSSLAB_DATA_DIR=str(data_dir))
    with open(os.devnull, "wb") as nothing:
        process = forks.start(
            "weak", "serve", "--port", str(port),
            environment=environment, stdout=nothing, stderr=nothing,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"

    def is_answered() -> bool:
        try:
            return httpx.get(f"{url}/healthz", verify=False).is_success
        except httpx.HTTPError:
            return False

    try:
        wait_for(is_answered)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_running_server_says_what_may_not_be_written(data_dir: Path) -> None:
    content = make_npz(images=GRIDS)
    with serving(data_dir) as url:
        with closed(data_dir / "datasets"):
            refused = httpx.put(f"{url}/datasets/mine", content=content)
            ready = httpx.get(f"{url}/readyz")
        assert refused.status_code == 503
        assert "the service cannot write its files" in refused.json()["detail"]
        assert str(data_dir / "datasets") in refused.json()["detail"]
        assert "may not use it" in refused.json()["detail"]
        assert (ready.status_code, ready.json()["disk"]) == (503, False)
        assert httpx.put(f"{url}/datasets/mine", content=content).status_code == 201
        assert httpx.get(f"{url}/readyz").status_code == 200


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
@pytest.mark.parametrize("path", ["/break", "/ui/break"])
def test_refusal_of_the_system_is_no_error_of_ours(app: FastAPI, number: int, path: str) -> None:
    @app.get(path)
    def fail() -> None:
        raise OSError(number, os.strerror(number), "/data/datasets/x.npz")

    with open_client(app) as client:
        answer = client.get(path)
    assert answer.status_code == 503
    assert "/data/datasets/x.npz: " in answer.text
    if path == "/break":
        assert "[Errno" not in problem(answer, 503)["detail"]


# -- ports


def bind(**settings: object) -> str:
    """The line that an address is refused with."""
    with pytest.raises(StartError) as refused:
        open_listener(Settings().model_copy(update=settings))
    assert "[Errno" not in str(refused.value)
    return str(refused.value)


def test_port_in_use_is_told_apart() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = bind(port=port)
    assert line.startswith(f"cannot listen on 127.0.0.1 port {port}: another process uses it")
    assert "--port" in line


def test_low_port_is_told_apart() -> None:
    first = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
    if first <= 1:
        pytest.skip("every user may use every port here")
    ended = call("serve", "--port", "1")
    assert_told(ended, "cannot listen on 127.0.0.1 port 1: user ", "may not use a port below")
    assert "stop" not in ended[1]


def test_address_of_another_machine_is_told_apart() -> None:
    line = bind(host="192.0.2.1", published_host="127.0.0.1")
    assert "this machine has no such address" in line


def test_name_of_no_machine_is_told_apart() -> None:
    line = bind(host="no-such-machine.invalid", published_host="127.0.0.1")
    assert "no machine has this name" in line


# -- words


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_every_error_of_the_system_is_one_line_with_its_path(number: int) -> None:
    error = OSError(number, os.strerror(number), "/data/x")
    line = explain(error)
    assert line.startswith("/data/x: ")
    assert "\n" not in line
    assert "{" not in line
    assert explain(OSError(number, os.strerror(number))) in line


def test_user_without_a_name_is_told_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container with `--user 4711`."""
    monkeypatch.setattr(os, "geteuid", lambda: 4_294_000_000)
    assert "user id 4294000000 may not use it" in explain(PermissionError(errno.EACCES, "x", "/x"))


def test_folder_that_can_be_used_is_made(tmp_path: Path) -> None:
    prepare_folder(tmp_path / "a/b", parts=[tmp_path / "a/b/none"])
    assert (tmp_path / "a/b").is_dir()
    check_writable(tmp_path / "a/b")
