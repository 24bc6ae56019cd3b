"""The files of a job, and paths that cannot be reached."""

from pathlib import Path

import pytest

from server.files.artifacts import JobFiles
from server.files.hashes import compute_sha256
from server.models.tables import ArtifactKind

JOB_ID = "0123456789ab"


@pytest.fixture
def files(tmp_path: Path) -> JobFiles:
    files = JobFiles(tmp_path / "runs", JOB_ID)
    files.create()
    return files


def test_file_gets_its_name_once_it_is_whole(files: JobFiles) -> None:
    written = files.write(
        ArtifactKind.checkpoint,
        epoch=3,
        write_to=lambda path: path.write_bytes(b"weights") and None,
    )
    assert written.file_name == "checkpoint_epoch_3.safetensors"
    with pytest.raises(FileNotFoundError):
        files.path(written.file_name)
    written.publish()
    written.publish()
    path = files.path(written.file_name)
    assert path.read_bytes() == b"weights"
    assert (written.size_bytes, written.sha256) == (7, compute_sha256(path))


def test_writer_that_raises_leaves_no_file(files: JobFiles) -> None:
    def write_to(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write(ArtifactKind.checkpoint, epoch=1, write_to=write_to)
    assert list(files.checkpoints_dir.iterdir()) == []


def test_sweep_removes_what_no_row_names_and_renews_the_best(files: JobFiles) -> None:
    for epoch in (1, 2, 3):
        written = files.write(
            ArtifactKind.reconstruction,
            epoch=epoch,
            write_to=lambda path, epoch=epoch: path.write_text(str(epoch)) and None,  # type: ignore[misc]
        )
        written.publish()
    (files.checkpoints_dir / ".half.png").write_text("of a killed worker")
    named = {"reconstructions_epoch_1.png", "reconstructions_epoch_2.png"}
    for best_epoch in (1, 2, 2):
        files.sweep(named, best_epoch)
        best = files.checkpoints_dir / "reconstructions_best.png"
        assert best.read_text() == str(best_epoch)
        assert {path.name for path in files.checkpoints_dir.iterdir()} == {*named, best.name}
    files.sweep(named, 3)
    assert {path.name for path in files.checkpoints_dir.iterdir()} == named


@pytest.mark.parametrize("name", ["../job.log", "/etc/passwd", "..", "", "missing.png", "a/../b"])
def test_path_leads_to_nothing_outside_the_folder(files: JobFiles, name: str) -> None:
    files.log_path.write_text("secret")
    with pytest.raises(FileNotFoundError):
        files.path(name)


def test_path_follows_no_link(files: JobFiles, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    (files.checkpoints_dir / "reconstructions_epoch_1.png").symlink_to(secret)
    with pytest.raises(FileNotFoundError):
        files.path("reconstructions_epoch_1.png")


@pytest.mark.parametrize("job_id", ["..", "", "0123456789AB", "0123456789ab/..", "0123456789abc"])
def test_no_other_id_names_a_folder(tmp_path: Path, job_id: str) -> None:
    with pytest.raises(AssertionError):
        JobFiles(tmp_path, job_id)


def test_tail_of_the_log(files: JobFiles) -> None:
    assert files.read_log() == ""
    files.log_path.write_text("one\ntwo\nthree\n")
    assert files.read_log(tail=2) == "two\nthree\n"
    assert files.read_log() == "one\ntwo\nthree\n"


def test_delete_removes_the_folder_and_is_harmless_twice(files: JobFiles) -> None:
    files.delete()
    files.delete()
    assert not files.job_dir.exists()
