"""What is stored of an epoch: a checkpoint, then pictures, then one transaction that records the
epoch and names both. All of it happens on a thread of its own."""

import logging
import time
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Final, NamedTuple

from torch import Tensor

from server.files.artifacts import LostFileError, WrittenFile
from server.jobs import records
from server.logs import keep_marks
from server.models.epochs import EpochMetrics
from server.models.tables import Artifact, ArtifactKind, BestBy, ResumePoint
from worker.attempt import Attempt
from worker.checkpoints import save_checkpoint
from worker.metrics import SplitMetrics
from worker.pictures import PICTURES, Picture
from worker.redrawing import write_title
from worker.trackers import TrackerGroup
from worker.training import EpochResult, Trainer, TrainingState

#: Epochs that training may be ahead of the database, for example during an outage.
MAX_PENDING: Final = 8

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _KeptEpoch:
    """An epoch whose checkpoint and pictures are kept, copied before the next epoch changes the
    model."""

    result: EpochResult
    state: TrainingState
    pictures: dict[ArtifactKind, Picture]
    best_by: frozenset[BestBy]


@dataclass(frozen=True, slots=True)
class _InterimEpoch:
    """An epoch without a checkpoint: its state is the point to resume from until the next one."""

    result: EpochResult
    state: TrainingState


class _Best(NamedTuple):
    """The best epoch so far and its score, which is better the higher it is."""

    epoch: int | None
    score: float | None

    def is_reached(self, epoch: int, score: float) -> bool:
        # An epoch that an earlier attempt recorded as the best is the best again.
        return self.score is None or score > self.score or epoch == self.epoch


class EpochRecorder:
    """Stores a job's epochs in order, at most MAX_PENDING behind the training thread."""

    def __init__(
        self, attempt: Attempt, *, trackers: TrackerGroup, sample_batches: list[Tensor]
    ) -> None:
        job = attempt.job
        self._attempt = attempt
        self._config = job.trainable_config
        self._bests = {
            BestBy.loss: _Best(job.best_epoch, _negate(job.best_val_recon_loss)),
            BestBy.likelihood: _Best(job.best_likelihood_epoch, job.best_val_log_likelihood),
        }
        self._trackers = trackers
        self._sample_batches = sample_batches
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recorder")
        self._pending: deque[Future[None]] = deque()
        self._saved_at = time.monotonic()

    def record(self, result: EpochResult, trainer: Trainer) -> None:
        """Copy what has to be stored of the epoch, and return. Raises the error of an earlier
        epoch that could not be stored."""
        self._make_room(MAX_PENDING - 1)
        best_by = self._update_bests(result)
        state = trainer.copy_state()
        if best_by or self._is_scheduled(result.epoch):
            kept = _KeptEpoch(result, state, self._take_pictures(trainer, result), best_by)
            self._submit(lambda: self._store_kept(kept))
        else:
            interim = _InterimEpoch(result, state)
            self._submit(lambda: self._store_interim(interim))

    def save(self, trainer: Trainer) -> None:
        """Let a later attempt continue from here, inside an epoch."""
        self._make_room(MAX_PENDING - 1)
        state = trainer.copy_state()
        self._submit(lambda: self._store_state(state))

    def save_if_due(self, trainer: Trainer) -> None:
        """As `save`, if nothing was stored for `checkpoint_seconds`."""
        if time.monotonic() - self._saved_at > self._attempt.settings.checkpoint_seconds:
            self.save(trainer)

    def wait(self) -> None:
        """Return once everything so far is stored. Raises the error of what could not be."""
        self._make_room(0)

    def close(self) -> None:
        """End the thread: what it is storing is finished first, the rest is dropped."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _submit(self, store: Callable[[], None]) -> None:
        self._saved_at = time.monotonic()
        self._pending.append(
            self._executor.submit(keep_marks(partial(_store_again_if_lost, store)))
        )

    def _make_room(self, num_pending: int) -> None:
        while self._pending and (self._pending[0].done() or len(self._pending) > num_pending):
            self._pending.popleft().result()

    def _update_bests(self, result: EpochResult) -> frozenset[BestBy]:
        """By what the epoch is the best so far."""
        scores = {
            BestBy.loss: -result.val.recon_loss,
            BestBy.likelihood: result.val.log_likelihood,
        }
        reached = {
            by: _Best(result.epoch, score)
            for by, score in scores.items()
            if score is not None and self._bests[by].is_reached(result.epoch, score)
        }
        self._bests |= reached
        return frozenset(reached)

    def _is_scheduled(self, epoch: int) -> bool:
        return epoch % self._config.checkpoint_every == 0 or epoch == self._config.epochs

    def _take_pictures(self, trainer: Trainer, result: EpochResult) -> dict[ArtifactKind, Picture]:
        return {
            kind: take(
                trainer.model,
                self._sample_batches,
                device=trainer.device,
                matched_shift=result.val.matched_shift,
            )
            for kind, take in PICTURES.items()
        }

    def _store_kept(self, epoch: _KeptEpoch) -> None:
        checkpoint = self._attempt.files.write(
            ArtifactKind.checkpoint,
            epoch=epoch.state.epoch,
            write_to=lambda path: save_checkpoint(path, epoch.state, config=self._config),
        )
        pictures = self._write_pictures(epoch)
        self._record_epoch(
            epoch.result,
            files=[checkpoint, *pictures.values()],
            publish=lambda: self._publish(epoch, checkpoint, pictures),
            best_by=epoch.best_by,
        )

    def _store_interim(self, epoch: _InterimEpoch) -> None:
        file = self._write_resume_point(epoch.state)

        def publish() -> list[Artifact]:
            file.publish()
            return []  # the job's row names a resume point

        self._record_epoch(
            epoch.result,
            files=[file],
            publish=publish,
            resume_point=_describe_resume_point(file, epoch.state),
        )

    def _record_epoch(
        self,
        result: EpochResult,
        *,
        files: list[WrittenFile],
        publish: Callable[[], list[Artifact]],
        resume_point: ResumePoint | None = None,
        best_by: Collection[BestBy] = (),
    ) -> None:
        """Record the epoch with its files, then remove what is no longer named."""
        try:
            self._attempt.write(
                records.record_epoch,
                make_row(result, attempt=self._attempt),
                publish=publish,
                resume_point=resume_point,
                best_by=best_by,
                progress=result.epoch / self._config.epochs,
            )
        finally:
            for file in files:
                file.discard()
        self._attempt.write(records.keep_named_files, files=self._attempt.files)
        _log_epoch(result, num_epochs=self._config.epochs)
        self._trackers.log_epoch(result)

    def _publish(
        self,
        epoch: _KeptEpoch,
        checkpoint: WrittenFile,
        pictures: dict[ArtifactKind, WrittenFile],
    ) -> list[Artifact]:
        """Give the epoch's files their names; returns the rows that name them.

        Raises OSError if the checkpoint is gone. A picture that is gone is drawn again in the end.
        """
        checkpoint.publish()
        artifacts = [self._make_artifact(ArtifactKind.checkpoint, checkpoint, result=epoch.result)]
        for kind, file in pictures.items():
            try:
                file.publish()
            except OSError as error:
                _logger.warning("the picture of epoch %d is lost: %s", epoch.result.epoch, error)
                continue
            _logger.info("[VISUALIZATION] Saved: %s", file.file_name)
            artifact = self._make_artifact(kind, file, result=epoch.result)
            artifact.samples = epoch.pictures[kind].describe_samples()
            artifacts.append(artifact)
        return artifacts

    def _store_state(self, state: TrainingState) -> None:
        if not state.is_finite:
            return  # the attempt is about to fail, and no other can continue from here
        written = self._write_resume_point(state)
        try:
            self._attempt.write(
                records.record_resume_point,
                _describe_resume_point(written, state),
                publish=written.publish,
            )
        finally:
            written.discard()
        self._attempt.write(records.keep_named_files, files=self._attempt.files)

    def _write_resume_point(self, state: TrainingState) -> WrittenFile:
        return self._attempt.files.write_resume_point(
            attempt=self._attempt.lease.attempt,
            epoch=state.epoch,
            step=state.step,
            write_to=lambda path: save_checkpoint(path, state, config=self._config),
        )

    def _write_pictures(self, epoch: _KeptEpoch) -> dict[ArtifactKind, WrittenFile]:
        """A picture that cannot be drawn is an event on the job, and never ends the training."""
        written = {}
        for kind, picture in epoch.pictures.items():
            try:
                written[kind] = self._write_picture(kind, picture, epoch=epoch)
            except Exception as error:
                number = epoch.result.epoch
                message = f"the picture of epoch {number} could not be written: {error}"
                _logger.exception(message)
                self._attempt.warn(message)
        return written

    def _write_picture(
        self, kind: ArtifactKind, picture: Picture, *, epoch: _KeptEpoch
    ) -> WrittenFile:
        number, job = epoch.result.epoch, self._attempt.job
        title = write_title(job, epoch=number, is_best=BestBy.loss in epoch.best_by)
        return self._attempt.files.write(
            kind, epoch=number, write_to=lambda path: picture.render(path, title=title)
        )

    def _make_artifact(
        self, kind: ArtifactKind, file: WrittenFile, *, result: EpochResult
    ) -> Artifact:
        return Artifact(
            job_id=self._attempt.job.id,
            kind=kind,
            epoch=result.epoch,
            file_name=file.file_name,
            size_bytes=file.size_bytes,
            sha256=file.sha256,
        )


def _store_again_if_lost(store: Callable[[], None]) -> None:
    """Some programs remove or cut what they take for another one's temporary file."""
    try:
        store()
    except LostFileError as error:
        _logger.warning("%s; it is written again", error)
        store()


def _describe_resume_point(file: WrittenFile, state: TrainingState) -> ResumePoint:
    return ResumePoint(
        file_name=file.file_name, sha256=file.sha256, epoch=state.epoch, step=state.step
    )


def _negate(value: float | None) -> float | None:
    return None if value is None else -value


def make_row(result: EpochResult, *, attempt: Attempt) -> EpochMetrics:
    """The epoch as its row: each split's metrics under the split's prefix."""
    values = asdict(result)
    for split in ("train", "val"):
        values |= {f"{split}_{name}": value for name, value in values.pop(split).items()}
    return EpochMetrics(job_id=attempt.job.id, attempt=attempt.lease.attempt, **values)


def _log_epoch(result: EpochResult, *, num_epochs: int) -> None:
    _logger.info(
        "[EPOCH %d/%d] loss %.5f, accuracy %.4f | validation: %s | %.1f s, %.0f grids/s",
        result.epoch,
        num_epochs,
        result.train.loss,
        result.train.pixel_accuracy,
        _describe(result.val),
        result.seconds,
        result.grids_per_second,
    )


def _describe(metrics: SplitMetrics) -> str:
    recall = metrics.foreground_recall
    return (
        f"reconstruction loss {metrics.recon_loss:.5f}, accuracy {metrics.pixel_accuracy:.4f}, "
        f"foreground recall {'none' if recall is None else f'{recall:.3f}'}, "
        f"{metrics.active_units} of {len(metrics.kl_per_dimension)} dimensions active"
    )
