"""Where else a run's curves go: an optional Weights & Biases project."""

from dataclasses import asdict
from typing import Protocol

from server.models import Job
from worker.training import EpochResult


class Tracker(Protocol):
    """Told of every epoch, and of the end."""

    def log_epoch(self, result: EpochResult) -> None: ...

    def close(self) -> None: ...


class NoTracker:
    """The database alone."""

    def log_epoch(self, result: EpochResult) -> None:
        pass

    def close(self) -> None:
        pass


class WandbTracker:
    """One W&B run a job; a later attempt continues the same run."""

    def __init__(self, job: Job, *, project: str) -> None:
        import wandb  # noqa: PLC0415 - an optional dependency that is slow to import

        self._run: wandb.Run = wandb.init(
            project=project,
            id=job.id,
            name=job.name or job.id,
            group=f"option-{job.option}",
            config=job.config,
            resume="allow",
        )

    def log_epoch(self, result: EpochResult) -> None:
        values = asdict(result)
        for split in ("train", "val"):
            values |= {f"{split}/{name}": value for name, value in values.pop(split).items()}
        self._run.log({name: v for name, v in values.items() if not isinstance(v, list)})

    def close(self) -> None:
        self._run.finish()


def open_tracker(job: Job, *, wandb_project: str) -> Tracker:
    """The tracker that the settings ask for. Raises ImportError if wandb is not installed."""
    return WandbTracker(job, project=wandb_project) if wandb_project else NoTracker()
