"""Jobs and epochs that were never trained, for judging."""

from collections.abc import Mapping
from typing import Any, Final

from server.judging.criteria import CriteriaSet, Criterion, Thresholds
from server.judging.histories import EpochSummary, KlSummary
from server.judging.verdicts import judge
from server.models.epochs import EpochMetrics
from server.models.options import BuiltInOption
from server.models.tables import Job, JobStatus

BACKGROUND_SHARE: Final = 0.93
#: What is measured of a model that knows objects and colours, and paints about as much as there is.
#: Jobs of older versions have none of it.
MEASURED: Final[Mapping[str, Any]] = {
    "val_foreground_share": 0.07,
    "val_foreground_precision": 0.4,
    "val_foreground_ap": 0.5,
    "val_colour_ap": 0.4,
    "val_colour_prevalence": 0.0078,
    "val_matched_recall": 0.45,
    "val_matched_iou": 0.29,
    "val_mutual_information": 8.0,
    "val_active_units_variance": 2,
}
#: Series of three epochs. The model paints nothing, whatever it knows.
BLACK: Final = {
    "val_foreground_recall": [0.0] * 3,
    "val_foreground_iou": [0.0] * 3,
    "val_all_black_share": [1.0] * 3,
    "val_background_share": [1.0] * 3,
}
HEALTHY_LOSSES: Final = [1.0, 0.9, 0.8]


def make_job(status: JobStatus = JobStatus.succeeded, *, epochs: int = 3, **values: Any) -> Job:
    config = {"epochs": epochs} | values.pop("config", {})
    option = values.pop("option", BuiltInOption.b)
    return Job(option=option, config=config, status=status, **values)


def make_epoch(epoch: int = 1, **values: Any) -> EpochMetrics:
    """A healthy epoch of a job that is older than the measures; keyword arguments override it."""
    healthy: dict[str, Any] = {
        "job_id": "0" * 12,
        "epoch": epoch,
        "attempt": 1,
        "seconds": 1.0,
        "grids_per_second": 1.0,
        "beta": 1.0,
        "learning_rate": 1e-3,
        "num_loss_spikes": 0,
        "max_spike_ratio": 1.2,
        "train_loss": 1.0 / epoch,
        "train_recon_loss": 0.9 / epoch,
        "train_kl_loss": 0.1 / epoch,
        "train_pixel_accuracy": 0.8,
        "val_recon_loss": 0.85 / epoch,
        "val_foreground_recall": 0.6,
        "val_foreground_iou": 0.3,
        "val_background_share": 0.9,
        "val_all_black_share": 0.0,
        "val_kl_per_dimension": [1.0, 2.0],
    }
    return EpochMetrics(**healthy | values)


def make_measured_epoch(epoch: int = 1, **values: Any) -> EpochMetrics:
    return make_epoch(epoch, **MEASURED | values)


def summarise(row: EpochMetrics, *, is_last: bool = True) -> EpochSummary:
    """The epoch as it is read for verdicts and curves."""
    kl = KlSummary.of(row.val_kl_per_dimension)
    values = {name: getattr(row, name, None) for name in EpochSummary._fields}
    lists = {"val_kl_per_dimension": row.val_kl_per_dimension if is_last else ()}
    return EpochSummary(**values | lists | {"val_kl_total": kl.total, "val_kl_min": kl.min})


def history(*, is_measured: bool = False, **series: list[Any]) -> list[EpochMetrics]:
    """Epochs whose columns are the given series, of one length."""
    length = len(next(iter(series.values())))
    make = make_measured_epoch if is_measured else make_epoch
    return [
        make(i + 1, **{name: values[i] for name, values in series.items()}) for i in range(length)
    ]


def measured_history(**last: Any) -> list[EpochMetrics]:
    """Three measured epochs, of which the last has these values."""
    return [make_measured_epoch(1), make_measured_epoch(2), make_measured_epoch(3, **last)]


def find(
    name: str,
    job: Job,
    metrics: list[EpochMetrics],
    *,
    criteria_set: CriteriaSet = CriteriaSet.spec,
    **limits: float,
) -> Criterion:
    verdict = judge(job, metrics, Thresholds(**limits), criteria_set=criteria_set)
    return next(criterion for criterion in verdict.criteria if criterion.name == name)
