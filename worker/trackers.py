"""Where else a run's curves go: an optional Weights & Biases project."""

import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Protocol

from server.models import Job
from worker.training import EpochResult

_logger = logging.getLogger(__name__)


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


class ForgivingTracker:
    """Gives up on a tracker that fails: its curves are elsewhere, too, and training goes on."""

    def __init__(self, open_it: Callable[[], Tracker], *, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._tracker: Tracker = NoTracker()
        self._attempt(lambda: setattr(self, "_tracker", open_it()))

    def log_epoch(self, result: EpochResult) -> None:
        self._attempt(lambda: self._tracker.log_epoch(result))

    def close(self) -> None:
        self._attempt(self._tracker.close)

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            _logger.exception("tracking failed")
            self._tracker = NoTracker()
            self._warn(f"nothing more goes to Weights & Biases: {type(error).__name__}: {error}")


def open_tracker(job: Job, *, wandb_project: str, warn: Callable[[str], None]) -> Tracker:
    """The tracker that the settings ask for; `warn` hears of it if that fails."""
    if not wandb_project:
        return NoTracker()
    return ForgivingTracker(lambda: WandbTracker(job, project=wandb_project), warn=warn)
