"""Does with files what server and worker do, on the file system of a folder, and says how it went.

Run as a program under a shim that refuses some steps.
"""

import json
import logging
import sys
from pathlib import Path

from npz_files import GRIDS, make_npz

from server.database.engine import open_database, write_transaction
from server.files.artifacts import JobFiles
from server.files.datasets import DatasetExistsError, open_upload
from server.files.imports import Fit
from server.files.inspection import admit_upload, check_upload
from server.jobs.workers import register
from server.models.tables import ArtifactKind, Worker, WorkerState
from server.settings import Settings


def main() -> None:
    folder, told = Path(sys.argv[1]), list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    for _ in range(2):  # each step is reported once
        keep_epochs(JobFiles(folder / "runs", "0123456789ab"))
    use_database(Settings(data_dir=folder))
    taken = [
        upload(make_npz(images=grids), datasets_dir=folder / "datasets")
        for grids in (GRIDS, GRIDS, GRIDS + 1)
    ]
    sys.stdout.write(json.dumps({"told": told, "taken": taken}))


def keep_epochs(files: JobFiles) -> None:
    files.create()
    for epoch in (1, 2):
        text = f"epoch {epoch}"
        written = files.write(
            ArtifactKind.checkpoint,
            epoch=epoch,
            write_to=lambda path, text=text: path.write_text(text) and None,  # type: ignore[misc]
        )
        written.publish()
        for _ in range(2):
            files.renew_best(epoch, named={written.file_name})
            assert (files.checkpoints_dir / "best.safetensors").read_text() == text
    files.sweep(files.list_found(), named={"checkpoint_epoch_2.safetensors"})
    names = {path.name for path in files.checkpoints_dir.iterdir()}
    assert names == {"checkpoint_epoch_2.safetensors", "best.safetensors"}


def use_database(settings: Settings) -> None:
    engines = [open_database(settings) for _ in range(2)]
    for number, engine in enumerate(engines):
        worker = Worker(
            id=f"w/{number}", host="w", pid=number, device="none", state=WorkerState.idle
        )
        register(engine, worker)
        with write_transaction(engines[0]) as session:
            assert session.get(Worker, worker.id) is not None
    for engine in engines:
        engine.dispose()


def upload(content: bytes, *, datasets_dir: Path) -> bool | None:
    """Whether it was new; None if another data set has the name."""
    with open_upload(datasets_dir) as file:
        file.write(content)
        try:
            checked = check_upload(file, fit=Fit(), shown_name="mine.npz")
            return admit_upload(file, checked, name="mine", datasets_dir=datasets_dir)
        except DatasetExistsError:
            return None


if __name__ == "__main__":
    main()
