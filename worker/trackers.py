"""Trackers: other places that a job's curves go to, such as a Weights & Biases project.

A new tracker is one class with `log_epoch` and `close`, and one entry of `TRACKERS`.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Final, Protocol

from server.finite import make_finite
from server.models.tables import Job
from server.settings import Settings
from worker.training import EpochResult

_logger = logging.getLogger(__name__)

Warn = Callable[[str], None]


class Tracker(Protocol):
    """Receives every epoch, and the end."""

    def log_epoch(self, result: EpochResult) -> None: ...

    def close(self) -> None: ...


class WandbTracker:
    """One W&B run per job; a later attempt continues the same run."""

    def __init__(self, job: Job, settings: Settings) -> None:
        import wandb  # noqa: PLC0415 - an optional dependency that is slow to import

        self._run: wandb.Run = wandb.init(
            project=settings.wandb_project,
            id=job.id,
            name=job.name or job.id,
            group=f"option-{job.option}",
            config=job.config,
            resume="allow",
        )

    def log_epoch(self, result: EpochResult) -> None:
        values = make_finite(asdict(result))
        for split in ("train", "val"):
            values |= {f"{split}/{name}": value for name, value in values.pop(split).items()}
        self._run.log({name: v for name, v in values.items() if not isinstance(v, list)})

    def close(self) -> None:
        self._run.finish()


@dataclass(frozen=True, slots=True)
class TrackerKind:
    """A tracker that the settings can ask for."""

    label: str
    is_wanted: Callable[[Settings], bool]
    open: Callable[[Job, Settings], Tracker]


TRACKERS: Final = (
    TrackerKind("Weights & Biases", lambda settings: bool(settings.wandb_project), WandbTracker),
)


class TrackerGroup:
    """The trackers of one job. One that fails is left out from then on: its curves are in the
    database too, and training goes on."""

    def __init__(self, job: Job, *, settings: Settings, warn: Warn) -> None:
        """Open what the settings ask for; `warn` is called with what fails."""
        self._warn = warn
        self._trackers: dict[str, Tracker] = {}
        for kind in TRACKERS:
            if kind.is_wanted(settings):
                self._open(kind, job=job, settings=settings)

    def log_epoch(self, result: EpochResult) -> None:
        self._call_all(lambda tracker: tracker.log_epoch(result))

    def close(self) -> None:
        self._call_all(lambda tracker: tracker.close())

    def _open(self, kind: TrackerKind, *, job: Job, settings: Settings) -> None:
        try:
            self._trackers[kind.label] = kind.open(job, settings)
        except Exception as error:
            self._give_up(kind.label, error)

    def _call_all(self, call: Callable[[Tracker], None]) -> None:
        for label, tracker in list(self._trackers.items()):
            try:
                call(tracker)
            except Exception as error:
                del self._trackers[label]
                self._give_up(label, error)

    def _give_up(self, label: str, error: Exception) -> None:
        _logger.exception("tracking by %s failed", label)
        self._warn(f"nothing more goes to {label}: {type(error).__name__}: {error}")
