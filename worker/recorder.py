"""What becomes of an epoch: a checkpoint, then a picture, then one transaction that records
the epoch and names both. All of it happens on a thread of its own."""

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from sqlalchemy import Engine
from torch import Tensor

from server import job_queue
from server.artifacts import JobFiles, StoredFile
from server.job_queue import Lease
from server.models import Artifact, ArtifactKind, EpochMetrics, Job
from worker.checkpoints import save_checkpoint
from worker.metrics import SplitMetrics
from worker.trackers import Tracker
from worker.training import EpochResult, Trainer
from worker.visualization import Reconstruction, reconstruct, render_reconstructions

NUM_RECONSTRUCTIONS = 10

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """The model at the end of an epoch, copied before the next epoch changes it."""

    state: dict[str, Tensor]
    reconstructions: list[Reconstruction]


class EpochRecorder:
    """Stores a job's epochs in order, one behind the training thread at most."""

    def __init__(
        self,
        job: Job,
        lease: Lease,
        *,
        engine: Engine,
        files: JobFiles,
        tracker: Tracker,
        sample_batches: list[Tensor],
    ) -> None:
        self._job_id = job.id
        self._title = f"{job.name or job.id} · option {job.option}"
        self._config = job.training_config
        self._best_epoch = job.best_epoch
        self._best_val_recon_loss = job.best_val_recon_loss
        self._lease = lease
        self._engine = engine
        self._files = files
        self._tracker = tracker
        self._sample_batches = sample_batches
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="recorder")
        self._pending: Future[None] | None = None

    def record(self, result: EpochResult, trainer: Trainer) -> None:
        """Take what the epoch left behind and return; raises what the epoch before it met."""
        is_best = self._is_best(result)
        if is_best:
            self._best_epoch = result.epoch
            self._best_val_recon_loss = result.val.recon_loss
        snapshot = self._take_snapshot(trainer) if is_best or self._is_kept(result.epoch) else None
        self.wait()
        self._pending = self._executor.submit(self._store, result, snapshot, is_best=is_best)

    def wait(self) -> None:
        """Return once every epoch given so far is stored; raises what went wrong."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def close(self) -> None:
        """End the thread; what it is busy with is finished first."""
        self._executor.shutdown(wait=True)

    def _is_best(self, result: EpochResult) -> bool:
        # An epoch that an earlier attempt recorded as the best is so again.
        return (
            self._best_val_recon_loss is None
            or result.val.recon_loss < self._best_val_recon_loss
            or result.epoch == self._best_epoch
        )

    def _is_kept(self, epoch: int) -> bool:
        return epoch % self._config.checkpoint_every == 0 or epoch == self._config.epochs

    def _take_snapshot(self, trainer: Trainer) -> _Snapshot:
        reconstructions = reconstruct(
            trainer.model,
            self._sample_batches,
            device=trainer.device,
            num_samples=NUM_RECONSTRUCTIONS,
        )
        return _Snapshot(trainer.state_dict(), reconstructions)

    def _store(self, result: EpochResult, snapshot: _Snapshot | None, *, is_best: bool) -> None:
        artifacts = []
        if snapshot is not None:
            artifacts.append(self._save_checkpoint(snapshot, epoch=result.epoch))
            artifacts += self._save_picture(snapshot, epoch=result.epoch, is_best=is_best)
        superseded = job_queue.record_epoch(
            self._engine,
            self._lease,
            make_row(result, job_id=self._job_id, attempt=self._lease.attempt),
            artifacts=artifacts,
            is_best=is_best,
            progress=result.epoch / self._config.epochs,
        )
        if is_best:
            for artifact in artifacts:
                self._files.link_best(artifact.kind, epoch=result.epoch)
        for file_name in superseded:
            self._files.remove(file_name)
        _log_epoch(result, num_epochs=self._config.epochs)
        self._tracker.log_epoch(result)

    def _save_checkpoint(self, snapshot: _Snapshot, *, epoch: int) -> Artifact:
        def write_to(path: Path) -> None:
            save_checkpoint(path, snapshot.state, config=self._config, epoch=epoch)

        stored = self._files.write(ArtifactKind.checkpoint, epoch=epoch, write_to=write_to)
        return self._make_artifact(ArtifactKind.checkpoint, stored, epoch=epoch)

    def _save_picture(self, snapshot: _Snapshot, *, epoch: int, is_best: bool) -> list[Artifact]:
        """No row if the picture cannot be written: that costs an event, never the training."""
        title = f"{self._title} · epoch {epoch} of {self._config.epochs}"

        def write_to(path: Path) -> None:
            render_reconstructions(
                snapshot.reconstructions, path, title=title + " · best so far" * is_best
            )

        try:
            stored = self._files.write(ArtifactKind.reconstruction, epoch=epoch, write_to=write_to)
        except Exception as error:
            message = f"the picture of epoch {epoch} could not be written: {error}"
            _logger.exception(message)
            job_queue.add_event(self._engine, self._lease, kind="warning", message=message)
            return []
        _logger.info("[VISUALIZATION] Saved: %s", stored.file_name)
        artifact = self._make_artifact(ArtifactKind.reconstruction, stored, epoch=epoch)
        artifact.samples = [sample.figures() for sample in snapshot.reconstructions]
        return [artifact]

    def _make_artifact(self, kind: ArtifactKind, stored: StoredFile, *, epoch: int) -> Artifact:
        return Artifact(job_id=self._job_id, kind=kind, epoch=epoch, **asdict(stored))


def make_row(result: EpochResult, *, job_id: str, attempt: int) -> EpochMetrics:
    """The epoch as its row: each split's figures under the split's prefix."""
    values = asdict(result)
    for split in ("train", "val"):
        values |= {f"{split}_{name}": value for name, value in values.pop(split).items()}
    return EpochMetrics(job_id=job_id, attempt=attempt, **values)


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
