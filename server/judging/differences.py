"""Paired differences: how far the secondary metrics of the best arms of a study are apart.

They decide nothing. Of the arms that are kept, the leader is compared with the next best, by the
seeds that both have.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final

from pydantic import BaseModel, Field

from server.judging.criteria import CriteriaSet
from server.judging.groups import RANKING_METRICS, GroupMetric, SeedResult
from server.judging.intervals import PairedDifference, paired_difference
from server.judging.studies import ArmVerdict, StudyVerdict

#: Arms that the leader is compared with: twenty arms would need a hundred bootstraps.
MAX_OTHERS: Final = 5
#: An open page of a running study asks again and again. Intervals of 1,999 resamples hold the true
#: median as often as those of 9,999 (measured with 5, 10 and 20 pairs), and take a third as long.
NUM_RESAMPLES: Final = 1999

Values = tuple[float, ...]


class ArmDifference(BaseModel):
    """The median of `arm` - `other` over the seeds that both have, with its 95 % interval."""

    metric: GroupMetric
    arm: str
    other: str
    median: float
    low: float
    high: float
    num_pairs: int = Field(description="seeds; fewer than five have no interval")


def compare_kept_arms(verdict: StudyVerdict) -> list[ArmDifference]:
    """The differences of the leader to the next best arms, by metric and then from the best."""
    results = {arm.arm: each for arm, each in zip(verdict.arms, verdict.results, strict=True)}
    kept = [arm for arm in verdict.arms if arm.arm in verdict.kept]
    ranked = rank_arms(kept, criteria_set=verdict.criteria_set)
    if not ranked:
        return []
    leader, others = ranked[0], ranked[1 : MAX_OTHERS + 1]
    found = [
        _compare(metric, leader.arm, other.arm, results=results)
        for metric in GroupMetric
        for other in others
    ]
    return [difference for difference in found if difference is not None]


def rank_arms(arms: Sequence[ArmVerdict], *, criteria_set: CriteriaSet) -> list[ArmVerdict]:
    """From the highest to the lowest pass rate, then by the median foreground IoU, by `evidence`
    the median average precision of the colours."""
    metric = RANKING_METRICS[criteria_set]

    def key(arm: ArmVerdict) -> tuple[float, float]:
        median = arm.metrics[metric].median
        return (_or_lowest(arm.pass_rate), _or_lowest(median))

    return sorted(arms, key=key, reverse=True)


def _or_lowest(value: float | None) -> float:
    return -1.0 if value is None else value


def _compare(
    metric: GroupMetric, arm: str, other: str, *, results: Mapping[str, Sequence[SeedResult]]
) -> ArmDifference | None:
    first, second = (_read_values(results[name], metric) for name in (arm, other))
    seeds = [seed for seed in first if seed in second]
    difference = _find_difference(
        tuple(first[seed] for seed in seeds), tuple(second[seed] for seed in seeds)
    )
    if difference is None:
        return None
    return ArmDifference(
        metric=metric,
        arm=arm,
        other=other,
        median=difference.median,
        low=difference.low,
        high=difference.high,
        num_pairs=difference.num_pairs,
    )


def _read_values(results: Sequence[SeedResult], metric: GroupMetric) -> dict[int, float]:
    """The metric's values by seed."""
    values = {result.seed: result.metrics.get(metric) for result in results}
    return {seed: value for seed, value in values.items() if value is not None}


@lru_cache(maxsize=500)
def _find_difference(first: Values, second: Values) -> PairedDifference | None:
    return paired_difference(first, second, num_resamples=NUM_RESAMPLES)
