"""What a model knows beside what it paints, in words, and the levels of a model that knows nothing.

Sources: Hoffman and Johnson (2016) for the mutual information; Menon et al. (2021) for the shift of
the background's logit, after which the painted share is the true one.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Self

from sqlalchemy import select
from sqlmodel import Session, col

from server.judging.criteria import Evidence, Thresholds
from server.judging.groups import (
    GROUP_METRICS,
    GroupMetric,
    GroupVerdict,
    MetricSummary,
    Side,
    read_metric,
)
from server.judging.histories import EpochSummary, History
from server.judging.numbers import NO_VALUE, format_number, format_share
from server.judging.painting import Painting
from server.models.epochs import EpochMetrics
from server.models.studies import StudyJob
from server.models.tables import Job

#: What the measures are, for reports that show them.
METHOD: Final = (
    "What a model knows is measured on the validation split, wherever the line between painted and "
    "not painted is drawn: the average precision (AP) of the foreground, scored by one minus the "
    "probability of background, and of the colours, each against the rest; the IoU after the "
    "background's logit is shifted until the painted share is the true one, a logit adjustment "
    "(Menon et al., 2021); the mutual information of grid and latent (Hoffman and Johnson, 2016), "
    "which N grids show only up to log N nats; and the dimensions that are active by the variance "
    "of their mean (Burda et al., 2016)."
)
SOURCES: Final = (
    "Y. Burda, R. Grosse and R. Salakhutdinov, Importance weighted autoencoders, ICLR (2016).",
    "M. D. Hoffman and M. J. Johnson, ELBO surgery: yet another way to carve up the variational "
    "evidence lower bound, NIPS workshop on advances in approximate Bayesian inference (2016).",
    "A. K. Menon et al., Long-tail learning via logit adjustment, ICLR (2021).",
)
#: Grids of the validation split by which the worker estimates the mutual information.
MAX_GRIDS: Final = 10_000
#: Nats below the most that can be shown; an estimate so near to it is too low.
_NEAR_MOST: Final = 0.5
#: Levels in one drawing; jobs on more than three different data sets are rare.
_MAX_LEVELS: Final = 3
#: Splits that differ by less have the same level: seeds may each have data of their own.
_SAME_LEVEL: Final = 0.1


@dataclass(frozen=True, slots=True)
class MeasureTable:
    """The metrics of runs or arms, a row for each: what it paints beside what it knows. Metrics
    that none of them has are left out."""

    metrics: list[GroupMetric]
    rows: list[list[str]]

    @classmethod
    def of_runs(cls, histories: Iterable[History]) -> Self:
        """The values of each run."""
        return cls._make(
            {metric: read_metric(metric, epochs) for metric in GroupMetric} for epochs in histories
        )

    @classmethod
    def of_arms(cls, arms: Iterable[GroupVerdict]) -> Self:
        """The median of each arm's judged seeds, with the range."""
        return cls._make(arm.metrics for arm in arms)

    @classmethod
    def _make(cls, values: Iterable[Mapping[GroupMetric, float | MetricSummary | None]]) -> Self:
        rows = [{metric: _show(value) for metric, value in row.items()} for row in values]
        metrics = [
            metric for metric in GROUP_METRICS if any(row[metric] != NO_VALUE for row in rows)
        ]
        return cls(metrics, [[row[metric] for metric in metrics] for row in rows])

    @property
    def titles(self) -> list[str]:
        return [GROUP_METRICS[metric].title for metric in self.metrics]

    @property
    def columns(self) -> list[str]:
        """The titles with their sides, for tables with one heading: `knows: foreground AP`."""
        registered = [GROUP_METRICS[metric] for metric in self.metrics]
        return [f"{each.side.name}: {each.title}" for each in registered]

    @property
    def has_measures(self) -> bool:
        """Whether any run or arm has a measure that old jobs lack."""
        return GroupMetric.val_active_units_variance in self.metrics

    @property
    def sides(self) -> dict[Side, int]:
        """The number of columns of each side, in their order."""
        return dict(Counter(GROUP_METRICS[metric].side for metric in self.metrics))


def _show(value: float | MetricSummary | None) -> str:
    """A number, or a median with its range: `0.383 (0.36 to 0.41)`."""
    if not isinstance(value, MetricSummary):
        return format_number(value)
    if value.median is None:
        return NO_VALUE
    low, high = format_number(value.min), format_number(value.max)
    return f"{format_number(value.median)} ({low} to {high})"


@dataclass(frozen=True, slots=True)
class Chance:
    """The average precisions of random scores: the shares of the cells that are foreground, and the
    mean shares of its colours. One value for each data set; none if nothing was measured."""

    foreground: tuple[float, ...] = ()
    colour: tuple[float, ...] = ()

    @classmethod
    def of_runs(cls, histories: Iterable[History]) -> Self:
        """By the final epoch of each run."""
        finals = [epochs[-1] for epochs in histories if epochs]
        return cls(
            find_levels(final.val_foreground_share for final in finals),
            find_levels(final.val_colour_prevalence for final in finals),
        )

    @classmethod
    def read(cls, session: Session, study_id: str) -> Self:
        """By the last epochs of a study's jobs, in one query."""
        shares = select(
            col(EpochMetrics.val_foreground_share), col(EpochMetrics.val_colour_prevalence)
        )
        last = (
            shares.join(Job, col(Job.id) == col(EpochMetrics.job_id))
            .join(StudyJob, col(StudyJob.job_id) == col(Job.id))
            .where(
                col(StudyJob.study_id) == study_id,
                col(EpochMetrics.epoch) == col(Job.epochs_completed),
            )
        )
        columns = zip(*session.execute(last).all(), strict=True)
        return cls(*map(find_levels, columns))

    def describe(self) -> str:
        """`Of the cells 6.9% are foreground. Random scores have a foreground AP of 0.069 and a
        colour AP of 0.0077.`, or nothing."""
        if not self.foreground:
            return ""
        shares, foreground = (" or ".join(map(show, self.foreground))
                              for show in (format_share, _show_level))  # fmt: skip
        text = f"Of the cells {shares} are foreground. Random scores have a foreground AP of "
        colour = " or ".join(map(_show_level, self.colour))
        return f"{text}{foreground}{f' and a colour AP of {colour}' if colour else ''}."


def find_levels(values: Iterable[float | None]) -> tuple[float, ...]:
    """The different ones of the values, at most three, each the median of those that are alike."""
    levels: list[list[float]] = []
    for value in sorted(value for value in values if value is not None):
        if not levels or value > levels[-1][0] * (1 + _SAME_LEVEL):
            levels.append([])
        levels[-1].append(value)
    return tuple(statistics.median(level) for level in levels[:_MAX_LEVELS])


def _show_level(level: float) -> str:
    return format_number(level, 2)


def describe_run(job: Job, epochs: History) -> str | None:
    """What the final epoch paints and knows; None before the first one."""
    painting = Painting.of(Evidence(job, epochs, Thresholds()))
    if painting is None:
        return None
    final = epochs[-1]
    most = find_most_information(job)
    sentences = [_describe_painting(painting, final), _describe_knowledge(final, most=most)]
    return " ".join(f"{sentence}." for sentence in sentences if sentence)


def find_most_information(job: Job) -> float | None:
    """The most nats of mutual information that the job's validation grids can show; None before
    their number is known."""
    num_val = (job.dataset_summary or {}).get("num_val")
    return math.log(min(num_val, MAX_GRIDS)) if num_val else None


def is_measured(epochs: History) -> bool:
    """Whether the final epoch has the measures; without an epoch, nothing is missing yet."""
    return not epochs or epochs[-1].val_active_units_variance is not None


def _describe_painting(painting: Painting, final: EpochSummary | EpochMetrics) -> str:
    """`It paints 0.1% of the cells where 6.9% are foreground; at the true share the same weights
    reach IoU 0.10`."""
    text = f"It paints {format_share(painting.painted_share)} of the cells"
    if painting.foreground_share is not None:
        text += f" where {format_share(painting.foreground_share)} are foreground"
    if final.val_matched_iou is None:
        return text
    return f"{text}; at the true share the same weights reach IoU {final.val_matched_iou:.2f}"


def _describe_knowledge(final: EpochSummary | EpochMetrics, *, most: float | None) -> str | None:
    """`Its latent carries 6.2 nats about the grid; foreground AP 0.36, chance 0.069; colour AP
    0.13, chance 0.0077`."""
    parts = []
    if final.val_mutual_information is not None:
        # An estimate of nothing is often a little below it.
        nats = max(0.0, final.val_mutual_information)
        is_too_low = most is not None and nats > most - _NEAR_MOST
        least = "at least " if is_too_low else ""
        parts.append(f"Its latent carries {least}{nats:.1f} nats about the grid")
    ranked = {
        "foreground AP": (final.val_foreground_ap, final.val_foreground_share),
        "colour AP": (final.val_colour_ap, final.val_colour_prevalence),
    }
    parts += [
        f"{name} {precision:.2f}, chance {_show_level(chance)}"
        for name, (precision, chance) in ranked.items()
        if precision is not None and chance is not None
    ]
    return "; ".join(parts) or None
