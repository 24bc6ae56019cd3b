"""Backup and restore of a stack with several workers, and with broken files."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from stack import ROOT, SHORT, Stack

# A second worker service, as in the documentation's example for a second GPU.
SECOND_WORKER = f"""
services:
  worker-1:
    extends: {{file: {ROOT}/docker/compose.base.yml, service: worker}}
    image: losslab-worker-cpu:test
    depends_on: {{server: {{condition: service_healthy}}}}
"""
#: Enough for the backup to happen before the last epoch.
NUM_EPOCHS = 8


@pytest.fixture(scope="module")
def wide_stack(
    stack: Stack, finished: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stack]:
    """The stack with two workers of one service and one worker of another."""
    override = tmp_path_factory.mktemp("second_worker") / "override.yml"
    override.write_text(SECOND_WORKER)
    wide_stack = stack.with_override(override)
    wide_stack.up(num_workers=2)
    yield wide_stack
    wide_stack.http.close()


@pytest.fixture(scope="module")
def training(wide_stack: Stack) -> str:
    """A job that trains while the backup is made."""
    job_id = wide_stack.post(epochs=NUM_EPOCHS)
    wide_stack.wait_for_epoch(job_id)
    return job_id


@pytest.fixture(scope="module")
def backup_dir(wide_stack: Stack, training: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backup")
    running = wide_stack.list_running()
    assert len(running) == 5
    wide_stack.run("docker/backup.sh", str(folder), *wide_stack.options)
    assert wide_stack.list_running() == running
    wide_stack.wait_until_ready()
    assert wide_stack.wait(training)["status"] == "succeeded"
    return folder


def test_backup_holds_what_belongs_together(wide_stack: Stack, backup_dir: Path) -> None:
    assert {path.name for path in backup_dir.iterdir()} == {
        "SHA256SUMS",
        "database.dump",
        "data.tar",
    }


def test_failed_backup_leaves_the_last_one_and_the_stack_as_they_were(
    wide_stack: Stack, backup_dir: Path
) -> None:
    before = {path.name: path.read_bytes() for path in backup_dir.iterdir()}
    wide_stack.compose("stop", "db")
    running = wide_stack.list_running()
    done = wide_stack.try_to_run("docker/backup.sh", str(backup_dir), *wide_stack.options)
    assert done.returncode != 0
    assert {path.name: path.read_bytes() for path in backup_dir.iterdir()} == before
    assert wide_stack.list_running() == running
    wide_stack.compose("start", "db")
    wide_stack.wait_until_ready()


@pytest.mark.parametrize(
    ("name", "has_hashes"),
    [("database.dump", True), ("database.dump", False), ("data.tar", False)],
)
def test_truncated_backup_is_refused_and_nothing_is_lost(
    wide_stack: Stack, backup_dir: Path, tmp_path: Path, name: str, has_hashes: bool
) -> None:
    before = wide_stack.read_everything()
    running = wide_stack.list_running()
    broken = shutil.copytree(backup_dir, tmp_path / "broken")
    whole = (broken / name).read_bytes()
    # A dump's table of contents is at its start, so reading it does not reveal the truncation.
    (broken / name).write_bytes(whole[: len(whole) - len(whole) // 10])
    if not has_hashes:
        (broken / "SHA256SUMS").unlink()
    done = wide_stack.try_to_run("docker/restore.sh", str(broken), *wide_stack.options)
    assert done.returncode != 0
    assert wide_stack.list_running() == running
    assert wide_stack.read_everything() == before


def test_restore_brings_back_what_was_saved_and_starts_what_ran(
    wide_stack: Stack, backup_dir: Path, training: str
) -> None:
    saved = wide_stack.read_everything()
    later = wide_stack.post(**SHORT, name="after the backup")
    assert wide_stack.wait(later)["status"] == "succeeded"
    running = wide_stack.list_running()
    wide_stack.run("docker/restore.sh", str(backup_dir), *wide_stack.options)
    assert wide_stack.list_running() == running
    wide_stack.wait_until_ready()
    # The job goes on from its state in the backup.
    assert wide_stack.wait(training)["status"] == "succeeded"
    restored = wide_stack.read_everything()
    assert len(restored.pop(training)["metrics"]["data"]) == NUM_EPOCHS
    del saved[training]
    assert restored == saved


def test_backup_restores_everything_on_an_empty_machine(wide_stack: Stack, tmp_path: Path) -> None:
    before = wide_stack.read_everything()
    wide_stack.run("docker/backup.sh", str(tmp_path), *wide_stack.options)
    wide_stack.compose("down", "-v")
    wide_stack.run("docker/restore.sh", str(tmp_path), *wide_stack.options)
    wide_stack.wait_until_ready()
    assert wide_stack.read_everything() == before
    job_id = wide_stack.post(**SHORT)
    assert wide_stack.wait(job_id)["status"] == "succeeded"
