"""What becomes of an epoch: a checkpoint, then a picture, then one transaction that records
the epoch and names both. All of it happens on a thread of its own."""

import logging
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass

from torch import Tensor

from server import job_records
from server.artifacts import WrittenFile
from server.models import Artifact, ArtifactKind, EpochMetrics, ResumePoint
from worker.attempt import Attempt
from worker.checkpoints import save_checkpoint
from worker.metrics import SplitMetrics
from worker.trackers import Tracker
from worker.training import EpochResult, Trainer, TrainingState
from worker.visualization import Reconstruction, reconstruct, render_reconstructions

NUM_RECONSTRUCTIONS = 10
#: Epochs that training may be ahead of the database, as while it is away.
MAX_PENDING = 8

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """An epoch's end, copied before the next epoch changes the model. Without
    reconstructions it is kept as the point to resume from only."""

    result: EpochResult
    state: TrainingState
    reconstructions: list[Reconstruction] | None
    is_best: bool


class EpochRecorder:
    """Stores a job's epochs in order, MAX_PENDING behind the training thread at most."""

    def __init__(self, attempt: Attempt, *, tracker: Tracker, sample_batches: list[Tensor]) -> None:
        job = attempt.job
        self._attempt = attempt
        self._name = job.name or job.id
        self._option = job.option
        self._config = job.training_config
        self._best_epoch = job.best_epoch
        self._best_val_recon_loss = job.best_val_recon_loss
        self._tracker = tracker
        self._sample_batches = sample_batches
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recorder")
        self._pending: deque[Future[None]] = deque()
        self._saved_at = time.monotonic()

    def record(self, result: EpochResult, trainer: Trainer) -> None:
        """Take what the epoch left behind and return; raises what an epoch before it met."""
        self._make_room(MAX_PENDING - 1)
        is_best = self._is_best(result)
        if is_best:
            self._best_epoch = result.epoch
            self._best_val_recon_loss = result.val.recon_loss
        is_kept = is_best or self._is_scheduled(result.epoch)
        snapshot = _Snapshot(
            result,
            trainer.copy_state(),
            self._reconstruct(trainer) if is_kept else None,
            is_best,
        )
        self._saved_at = time.monotonic()
        self._pending.append(self._executor.submit(self._store, snapshot))

    def save(self, trainer: Trainer) -> None:
        """Let a later attempt go on from here, inside an epoch."""
        self._make_room(MAX_PENDING - 1)
        self._saved_at = time.monotonic()
        self._pending.append(self._executor.submit(self._store_state, trainer.copy_state()))

    def save_if_due(self, trainer: Trainer) -> None:
        """As `save`, if nothing was stored for `checkpoint_seconds`."""
        if time.monotonic() - self._saved_at > self._attempt.settings.checkpoint_seconds:
            self.save(trainer)

    def wait(self) -> None:
        """Return once everything given so far is stored; raises what went wrong."""
        self._make_room(0)

    def close(self) -> None:
        """End the thread; what it is busy with is finished first, the rest is dropped."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _make_room(self, num_pending: int) -> None:
        while self._pending and (self._pending[0].done() or len(self._pending) > num_pending):
            self._pending.popleft().result()

    def _is_best(self, result: EpochResult) -> bool:
        # An epoch that an earlier attempt recorded as the best is so again.
        return (
            self._best_val_recon_loss is None
            or result.val.recon_loss < self._best_val_recon_loss
            or result.epoch == self._best_epoch
        )

    def _is_scheduled(self, epoch: int) -> bool:
        return epoch % self._config.checkpoint_every == 0 or epoch == self._config.epochs

    def _reconstruct(self, trainer: Trainer) -> list[Reconstruction]:
        return reconstruct(
            trainer.model,
            self._sample_batches,
            device=trainer.device,
            num_samples=NUM_RECONSTRUCTIONS,
        )

    def _store(self, snapshot: _Snapshot) -> None:
        state = self._write_state(snapshot)
        picture = self._write_picture(snapshot)
        try:
            self._attempt.write(
                job_records.record_epoch,
                make_row(snapshot.result, attempt=self._attempt),
                publish=lambda: self._publish(snapshot, state, picture),
                resume_point=_describe_resume_point(state, snapshot.state)
                if snapshot.reconstructions is None
                else None,
                is_best=snapshot.is_best,
                progress=snapshot.result.epoch / self._config.epochs,
            )
        finally:
            state.discard()
            if picture is not None:
                picture.discard()
        self._attempt.write(job_records.keep_named_files, sweep=self._attempt.files.sweep)
        _log_epoch(snapshot.result, num_epochs=self._config.epochs)
        self._tracker.log_epoch(snapshot.result)

    def _publish(
        self, snapshot: _Snapshot, state: WrittenFile, picture: WrittenFile | None
    ) -> list[Artifact]:
        """Give the epoch's files their names; a resume point has no row of its own."""
        state.publish()
        if snapshot.reconstructions is None:
            return []
        epoch = snapshot.result.epoch
        artifacts = [self._make_artifact(ArtifactKind.checkpoint, state, epoch=epoch)]
        if picture is not None:
            picture.publish()
            _logger.info("[VISUALIZATION] Saved: %s", picture.file_name)
            artifact = self._make_artifact(ArtifactKind.reconstruction, picture, epoch=epoch)
            artifact.samples = [sample.figures() for sample in snapshot.reconstructions]
            artifacts.append(artifact)
        return artifacts

    def _store_state(self, state: TrainingState) -> None:
        if not state.is_finite:
            return  # the attempt is about to fail by it, and none can go on from here
        written = self._write_resume_point(state)
        try:
            self._attempt.write(
                job_records.record_resume_point,
                _describe_resume_point(written, state),
                publish=written.publish,
            )
        finally:
            written.discard()
        self._attempt.write(job_records.keep_named_files, sweep=self._attempt.files.sweep)

    def _write_state(self, snapshot: _Snapshot) -> WrittenFile:
        if snapshot.reconstructions is None:
            return self._write_resume_point(snapshot.state)
        return self._attempt.files.write(
            ArtifactKind.checkpoint,
            epoch=snapshot.state.epoch,
            write_to=lambda path: save_checkpoint(path, snapshot.state, config=self._config),
        )

    def _write_resume_point(self, state: TrainingState) -> WrittenFile:
        return self._attempt.files.write_resume_point(
            attempt=self._attempt.lease.attempt,
            epoch=state.epoch,
            step=state.step,
            write_to=lambda path: save_checkpoint(path, state, config=self._config),
        )

    def _write_picture(self, snapshot: _Snapshot) -> WrittenFile | None:
        """None if there is nothing to draw, or if it cannot be drawn: that costs an event,
        never the training."""
        reconstructions, epoch = snapshot.reconstructions, snapshot.result.epoch
        if reconstructions is None:
            return None
        title = f"option {self._option} · epoch {epoch} of {self._config.epochs}"
        # The name comes last, since it may be too long for the picture.
        title += f"{' · best so far' * snapshot.is_best} · {self._name}"
        try:
            return self._attempt.files.write(
                ArtifactKind.reconstruction,
                epoch=epoch,
                write_to=lambda path: render_reconstructions(reconstructions, path, title=title),
            )
        except Exception as error:
            message = f"the picture of epoch {epoch} could not be written: {error}"
            _logger.exception(message)
            self._attempt.warn(message)
            return None

    def _make_artifact(self, kind: ArtifactKind, file: WrittenFile, *, epoch: int) -> Artifact:
        return Artifact(
            job_id=self._attempt.job.id,
            kind=kind,
            epoch=epoch,
            file_name=file.file_name,
            size_bytes=file.size_bytes,
            sha256=file.sha256,
        )


def _describe_resume_point(file: WrittenFile, state: TrainingState) -> ResumePoint:
    return ResumePoint(
        file_name=file.file_name, sha256=file.sha256, epoch=state.epoch, step=state.step
    )


def make_row(result: EpochResult, *, attempt: Attempt) -> EpochMetrics:
    """The epoch as its row: each split's figures under the split's prefix."""
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
