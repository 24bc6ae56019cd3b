"""The files of a job, and paths that cannot be reached."""

from pathlib import Path

import pytest

from server.files import artifacts
from server.files.artifacts import JobFiles, LostFileError, WrittenFile
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


@pytest.mark.parametrize("is_cut", [False, True], ids=["gone", "cut"])
def test_temporary_file_that_others_touched_gets_no_name(files: JobFiles, is_cut: bool) -> None:
    written = write_picture(files, "whole")
    if is_cut:
        written.temporary_path.write_text("who")
    else:
        written.temporary_path.unlink()
    with pytest.raises(LostFileError, match=r"reconstructions_epoch_1\.png"):
        written.publish()
    assert not written.path.exists()


def test_name_of_another_file_is_no_publication(files: JobFiles) -> None:
    written = write_picture(files, "mine")
    written.temporary_path.unlink()
    written.path.write_text("that")
    with pytest.raises(LostFileError):
        written.publish()


def test_worker_that_was_frozen_replaces_nothing_that_its_successor_wrote(files: JobFiles) -> None:
    write_picture(files, "of the attempt before").publish()
    late, later = write_picture(files, "late"), write_picture(files, "later")
    late_and_new = write_picture(files, "late", epoch=2)
    write_picture(files, "of the successor").publish()
    write_picture(files, "of the successor", epoch=2).publish()
    for written in (late, later, late_and_new):
        with pytest.raises(LostFileError, match="another worker"):
            written.publish()
        assert written.path.read_text() == "of the successor"


@pytest.mark.parametrize("is_cut", [False, True], ids=["gone", "cut"])
def test_file_that_others_touch_while_it_is_synced_is_lost(
    files: JobFiles, is_cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touch(path: Path) -> None:
        if is_cut:
            path.write_text("")
        else:
            path.unlink()

    # The moment cannot be met from outside.
    monkeypatch.setattr(artifacts, "set_mode", touch)
    with pytest.raises(LostFileError):
        write_picture(files, "whole")
    assert list(files.checkpoints_dir.iterdir()) == []


def write_picture(files: JobFiles, text: str, *, epoch: int = 1) -> WrittenFile:
    return files.write(
        ArtifactKind.reconstruction,
        epoch=epoch,
        write_to=lambda path: path.write_text(text) and None,
    )


def test_sweep_removes_nothing_that_was_written_after_its_names_were_read(files: JobFiles) -> None:
    leftover = files.checkpoints_dir / "reconstructions_epoch_1.png"
    leftover.write_text("of a killed worker")
    (files.checkpoints_dir / ".half.png").write_text("of a killed worker")
    found = files.list_found()
    # Here this worker is frozen, and another one writes the epochs.
    for epoch in (1, 2):
        write_picture(files, "of another worker", epoch=epoch).publish()
    assert files.sweep(found, named=set()) == 1
    names = {"reconstructions_epoch_1.png", "reconstructions_epoch_2.png"}
    assert {path.name for path in files.checkpoints_dir.iterdir()} == names
    assert leftover.read_text() == "of another worker"


def test_file_that_is_replaced_at_the_moment_of_its_removal_stays(
    files: JobFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = files.checkpoints_dir / "reconstructions_epoch_1.png"
    path.write_text("of a killed worker")
    found, move = files.list_found(), Path.rename

    def replace_and_move(source: Path, target: Path) -> Path:
        if source == path:
            write_picture(files, "of another worker").publish()
        return move(source, target)

    monkeypatch.setattr(Path, "rename", replace_and_move)
    assert files.sweep(found, named=set()) == 0
    assert path.read_text() == "of another worker"
    assert [other.name for other in files.checkpoints_dir.iterdir()] == [path.name]


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
        files.sweep(files.list_found(), named=named)
        files.renew_best(best_epoch, named=named)
        best = files.checkpoints_dir / "reconstructions_best.png"
        assert best.read_text() == str(best_epoch)
        assert {path.name for path in files.checkpoints_dir.iterdir()} == {*named, best.name}
    files.renew_best(3, named=named)
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
