"""Lost pictures: those that could not be written, or whose file is gone, drawn again from the
checkpoints of their epochs when a job ends."""

import logging
from collections.abc import Collection, Iterator
from typing import Final

from torch import Tensor

from server.files.artifacts import LostFileError, WrittenFile
from server.jobs import records
from server.models.configuration import TrainingConfig
from server.models.tables import Artifact, ArtifactKind, Job
from worker.attempt import Attempt
from worker.checkpoints import load_verified
from worker.data import Dataset, draw_reconstruction_batches
from worker.pictures import PICTURES
from worker.training import Trainer

NUM_RECONSTRUCTIONS: Final = 10

_logger = logging.getLogger(__name__)


def draw_samples(dataset: Dataset, *, config: TrainingConfig) -> list[Tensor]:
    """The grids that all pictures of a job show."""
    return draw_reconstruction_batches(
        dataset.train,
        num_samples=NUM_RECONSTRUCTIONS,
        batch_size=config.batch_size,
        seed=config.seed,
    )


def write_title(job: Job, *, epoch: int, is_best: bool) -> str:
    """What stands above a picture."""
    title = f"option {job.option} · epoch {epoch} of {job.training_config.epochs}"
    # The name comes last, since it may be too long for the picture.
    return f"{title}{' · best so far' * is_best} · {job.name or job.id}"


def redraw_lost_pictures(trainer: Trainer, dataset: Dataset, *, attempt: Attempt) -> None:
    """Draw what is lost of the job's pictures; what cannot be drawn is an event. The trainer has
    the weights of any epoch after that."""
    engine, job_id = attempt.engine, attempt.job.id
    checkpoints = {
        row.epoch: row for row in attempt.retrying(records.read_checkpoints, engine, job_id)
    }
    for kind in PICTURES:
        pictures = attempt.retrying(records.read_pictures, engine, job_id, kind=kind)
        for epoch in _list_lost(attempt, pictures, epochs=checkpoints.keys()):
            lost = f"the picture of epoch {epoch} is lost"
            if epoch not in checkpoints:
                attempt.warn(f"{lost}; it cannot be drawn again, since its checkpoint was not kept")
                continue
            try:
                artifact, file = _draw(
                    kind, checkpoints[epoch], trainer=trainer, dataset=dataset, attempt=attempt
                )
            except Exception as error:
                _logger.exception(lost)
                # Of one that was never written the job has an event already.
                if epoch in {picture.epoch for picture in pictures}:
                    attempt.warn(f"{lost}; it cannot be drawn again: {error}")
            else:
                _record(artifact, file, attempt=attempt)


def _list_lost(
    attempt: Attempt, pictures: list[Artifact], *, epochs: Collection[int]
) -> Iterator[int]:
    """The epochs with a checkpoint or a picture's row, whose picture is not as it was written."""
    rows = {picture.epoch: picture for picture in pictures}
    for epoch in sorted({*rows, *epochs}):
        try:
            row = rows[epoch]
            attempt.files.verified_path(row.file_name, sha256=row.sha256)
        except (KeyError, OSError):
            yield epoch


def _draw(
    kind: ArtifactKind,
    checkpoint: Artifact,
    *,
    trainer: Trainer,
    dataset: Dataset,
    attempt: Attempt,
) -> tuple[Artifact, WrittenFile]:
    """The picture's row and its file under a temporary name."""
    epoch, job = checkpoint.epoch, attempt.job
    trainer.load_weights(load_verified(attempt.files, checkpoint))
    samples = draw_samples(dataset, config=trainer.config)
    row = attempt.retrying(records.read_epoch, attempt.engine, job.id, epoch=epoch)
    picture = PICTURES[kind](
        trainer.model,
        samples,
        device=trainer.device,
        matched_shift=None if row is None else row.val_matched_shift,
    )
    bests = attempt.retrying(records.list_bests_so_far, attempt.engine, job.id)
    title = write_title(job, epoch=epoch, is_best=epoch in bests)
    file = attempt.files.write(
        kind, epoch=epoch, write_to=lambda path: picture.render(path, title=title)
    )
    artifact = Artifact(
        job_id=job.id,
        kind=kind,
        epoch=epoch,
        file_name=file.file_name,
        size_bytes=file.size_bytes,
        sha256=file.sha256,
        samples=picture.describe_samples(),
    )
    return artifact, file


def _record(artifact: Artifact, file: WrittenFile, *, attempt: Attempt) -> None:
    try:
        attempt.write(records.record_artifact, artifact, publish=file.publish)
        attempt.write(records.keep_named_files, files=attempt.files)
        _logger.info("[VISUALIZATION] Saved again: %s", file.file_name)
    except LostFileError as error:
        attempt.warn(f"the picture of epoch {artifact.epoch} is lost: {error}")
    finally:
        file.discard()
