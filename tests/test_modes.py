"""Who may read what the service keeps: its own user alone, or a group as well."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from npz_files import GRIDS, make_npz
from service import Service

from server.database.engine import open_database
from server.environment.modes import close_to_others
from server.settings import Settings


def find_modes(folder: Path) -> dict[str, int]:
    """The modes of a folder and of all that lies in it."""
    paths = [folder, *folder.rglob("*")]
    return {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in paths}


@pytest.mark.parametrize(("is_shared", "forbidden"), [(False, 0o077), (True, 0o007)])
def test_all_that_the_service_keeps_is_closed_to_others(
    tmp_path: Path, is_shared: bool, forbidden: int
) -> None:
    data_dir = tmp_path / "experiments"
    (data_dir / "datasets").mkdir(parents=True)
    for folder in (data_dir, data_dir / "datasets"):
        folder.chmod(0o755)  # as an older version made it
    service = Service(data_dir)
    service.environment["LOSSLAB_SHARED_WITH_GROUP"] = str(is_shared)
    former = os.umask(0o022)
    try:
        service.start("server", "worker")
        httpx.put(f"{service.url}/datasets/mine", content=make_npz(images=GRIDS), timeout=60)
        service.wait(service.train("b", dataset="mine", epochs=1)["id"])
        service.wait(service.train("b", epochs=1)["id"])
        modes = find_modes(data_dir)
    finally:
        os.umask(former)
        for name in list(service.processes):
            service.stop(name)
    assert len(modes) > 12
    assert {name: oct(mode) for name, mode in modes.items() if mode & forbidden} == {}
    if is_shared:
        assert {n: oct(mode) for n, mode in modes.items() if mode & 0o060 != 0o060} == {}
        assert all(modes[name] & stat.S_ISGID for name in (".", "datasets", "runs"))


def test_database_is_closed_to_others_wherever_it_lies(tmp_path: Path) -> None:
    former = os.umask(0o022)
    try:
        path = tmp_path / "own.db"
        settings = Settings(data_dir=tmp_path / "data", database_url=f"sqlite:///{path}")
        with open_database(settings).connect():
            modes = {found.name: found.stat().st_mode & 0o777 for found in tmp_path.glob("own.db*")}
    finally:
        os.umask(former)
    assert modes["own.db"] == 0o600
    assert set(modes.values()) == {0o600}


def test_local_import_is_closed_to_others(tmp_path: Path) -> None:
    source = tmp_path / "mine.npz"
    source.write_bytes(make_npz(images=GRIDS))
    command = "import os; os.umask(0o022); from server.cli.main import app; app()"
    subprocess.run(
        [sys.executable, "-c", command, "data", "import", str(source), "--local"],
        env=os.environ | {"LOSSLAB_DATA_DIR": str(tmp_path / "lab")},
        check=True,
        capture_output=True,
    )
    modes = find_modes(tmp_path / "lab")
    assert {name: oct(mode) for name, mode in modes.items() if mode & 0o077} == {}
    assert modes["datasets/mine.npz"] == 0o600


def test_folder_for_the_files_of_all_users_is_left_as_it_is_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path.chmod(0o1777)
    close_to_others([tmp_path, tmp_path / "missing"])
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o1777
    assert len(caplog.records) == 1
    assert f"{tmp_path} is open to other users" in caplog.text
