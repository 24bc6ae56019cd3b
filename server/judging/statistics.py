"""Which arms of a study are ruled out, and whether one can be recommended.

An arm is one configuration; its counts are how many of its judged seeds passed. An arm is ruled
out when another passes more often by Boschloo's exact test (Boschloo, 1970), one-sided, with
p <= error / (looks * (arms - 1)). Whatever the true chances, the best arm is tested against at
most arms - 1 others at each look, so that by the union bound it is ruled out with at most `error`.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from itertools import pairwise
from typing import Final

#: Numbers of seeds after which a study is judged, as far as its seeds go.
PLANNED_LOOKS: Final = (5, 10, 20, 40)
#: The chance that `more_seeds` gives the decision, if the pass rates stay as they are.
POWER: Final = 0.8

Count = tuple[int, int]
Counts = Mapping[str, Count]
Results = Mapping[str, Sequence[bool | None]]  # None is a seed that counts for nothing


class DecisionState(StrEnum):
    """What the counts allow to say."""

    decided = "decided"
    narrowed = "narrowed"
    undecided = "undecided"
    none = "none"
    no_data = "no_data"


@dataclass(frozen=True)
class RuledOut:
    """An arm that passes less often than the arm `by`, after `num_seeds` seeds."""

    arm: str
    by: str
    p_value: float
    num_seeds: int


@dataclass(frozen=True)
class Decision:
    """The state, the recommended arm (only in `decided`), and how many seeds are still needed.

    `more_seeds` is for each kept arm; it is None if no planned look is expected to decide.
    """

    state: DecisionState
    arm: str | None
    kept: list[str]
    ruled_out: list[RuledOut]
    more_seeds: int | None


@dataclass(frozen=True)
class Look:
    """A look at the first `num_seeds` seeds of each arm, and the arms that it ruled out."""

    num_seeds: int
    ruled_out: list[RuledOut]


@dataclass(frozen=True)
class SequentialDecision:
    """The decision at the last look, and every look up to it."""

    decision: Decision
    looks: list[Look]


# -- decisions


def plan_looks(num_seeds: int) -> list[int]:
    """The numbers of seeds at which a study of so many seeds is judged: 12 gives 5, 10, 12.

    Raises ValueError if there is no seed.
    """
    if num_seeds < 1:
        raise ValueError(f"a study has at least one seed, not {num_seeds}")
    return [look for look in PLANNED_LOOKS if look < num_seeds] + [num_seeds]


def decide(
    counts: Counts, *, num_looks: int = 4, error: float = 0.05, min_pass_rate: float = 0.5
) -> Decision:
    """The decision by one look at counts (passed, judged), of `num_looks` planned looks.

    `error` is the largest chance, over all looks, that the best arm is ruled out. Raises
    ValueError for counts that cannot be, and for an error, a rate or looks out of range.
    """
    _check_counts(counts)
    level = _find_level(error, num_looks=num_looks, num_arms=len(counts))
    ruled_out = _rule_out(counts, level=level)
    return _conclude(counts, ruled_out, level=level, min_pass_rate=min_pass_rate)


def decide_in_looks(
    results: Results,
    *,
    looks: Sequence[int],
    num_planned_looks: int | None = None,
    is_race: bool = False,
    error: float = 0.05,
    min_pass_rate: float = 0.5,
) -> SequentialDecision:
    """The decision after the `looks` that took place; True in `results` is a seed that passed.

    `results` has each arm's judged seeds in order of seed; a look at n uses the first n. An arm
    that was ruled out stays out and rules out no other. A race ends at the look that decides.
    `num_planned_looks` is the number of `looks` unless more are planned; the bound on the error
    holds for so many. Raises ValueError as `decide` does, and for looks that do not rise.
    """
    _check_looks(looks)
    num_looks = len(looks) or 1 if num_planned_looks is None else num_planned_looks
    level = _find_level(error, num_looks=num_looks, num_arms=len(results))
    stop_rate = min_pass_rate if is_race else None
    taken = _take_looks(results, looks, level=level, stop_rate=stop_rate)
    ruled_out = [entry for look in taken for entry in look.ruled_out]
    counts = _count(results, num_seeds=taken[-1].num_seeds if taken else 0)
    decision = _conclude(counts, ruled_out, level=level, min_pass_rate=min_pass_rate)
    return SequentialDecision(decision, taken)


def _take_looks(
    results: Results,
    looks: Sequence[int],
    *,
    level: float,
    stop_rate: float | None,
) -> list[Look]:
    """The looks up to the one that leaves a single arm that passes often enough to stop."""
    running, taken = dict(results), list[Look]()
    for look in looks:
        ruled_out = _rule_out(_count(running, num_seeds=look), level=level, num_seeds=look)
        taken.append(Look(look, ruled_out))
        for entry in ruled_out:
            del running[entry.arm]
        if stop_rate is not None and _is_decided(_count(running, num_seeds=look), stop_rate):
            break
    return taken


def _count(results: Results, *, num_seeds: int) -> dict[str, Count]:
    """The counts of each arm's first seeds; an arm with fewer has all of them counted."""
    used = {arm: [x for x in seeds[:num_seeds] if x is not None] for arm, seeds in results.items()}
    return {arm: (sum(map(bool, seeds)), len(seeds)) for arm, seeds in used.items()}


def _check_counts(counts: Counts) -> None:
    for arm, (passed, judged) in counts.items():
        if not 0 <= passed <= judged:
            raise ValueError(f"arm {arm}: {passed} of {judged} seeds cannot have passed")


def _check_looks(looks: Sequence[int]) -> None:
    if any(first >= second for first, second in pairwise([0, *looks])):
        raise ValueError(f"looks are rising numbers of seeds, not {list(looks)}")


def _find_level(error: float, *, num_looks: int, num_arms: int) -> float:
    """The largest p-value that rules out (Bonferroni over looks and other arms)."""
    if not 0 < error < 1:
        raise ValueError(f"the error is between 0 and 1, not {error}")
    if num_looks < 1:
        raise ValueError(f"there is at least one look, not {num_looks}")
    return error / (num_looks * max(1, num_arms - 1))


def _rule_out(counts: Counts, *, level: float, num_seeds: int | None = None) -> list[RuledOut]:
    """The arms that another passes more often than; `num_seeds` is an arm's own if None."""
    rivals, ruled_out = _find_rivals(counts), list[RuledOut]()
    for arm, (passed, judged) in counts.items():
        p_values = {by: _find_p_value(*counts[by], passed, judged) for by in rivals}
        by = min(p_values, key=lambda name: p_values[name])
        if p_values[by] <= level:
            ruled_out.append(RuledOut(arm, by, p_values[by], num_seeds or judged))
    return ruled_out


def _find_rivals(counts: Counts) -> list[str]:
    """Of each number of judged seeds the arm that passed most often.

    The p-value falls with the seeds that the rival passed, so that none of the others has a
    smaller one. Of equal arms the first is taken.
    """
    rivals: dict[int, str] = {}
    for arm, (passed, judged) in counts.items():
        if judged not in rivals or passed > counts[rivals[judged]][0]:
            rivals[judged] = arm
    return list(rivals.values())


def _conclude(
    counts: Counts, ruled_out: list[RuledOut], *, level: float, min_pass_rate: float
) -> Decision:
    """The decision between the arms that are kept."""
    if not 0 <= min_pass_rate <= 1:
        raise ValueError(f"the pass rate is between 0 and 1, not {min_pass_rate}")
    out = {entry.arm for entry in ruled_out}
    kept = {arm: count for arm, count in counts.items() if arm not in out}
    state = _find_state(kept, has_ruled_out=bool(out), min_pass_rate=min_pass_rate)
    is_decided = state == DecisionState.decided
    more_seeds = 0 if is_decided else _find_more_seeds(kept, level, min_pass_rate)
    return Decision(
        state, next(iter(kept)) if is_decided else None, list(kept), ruled_out, more_seeds
    )


def _find_state(kept: Counts, *, has_ruled_out: bool, min_pass_rate: float) -> DecisionState:
    if not any(judged for _, judged in kept.values()):
        return DecisionState.no_data
    if not any(passed for passed, _ in kept.values()):
        return DecisionState.none
    if _is_decided(kept, min_pass_rate):
        return DecisionState.decided
    return DecisionState.narrowed if has_ruled_out else DecisionState.undecided


def _is_decided(kept: Counts, min_pass_rate: float) -> bool:
    return len(kept) == 1 and _passes_often(*next(iter(kept.values())), min_pass_rate)


# -- the test


def load_library() -> None:
    """Import scipy, which takes two seconds the first time.

    To be called before a transaction: PostgreSQL ends one that is idle, and SQLite's would keep
    others from writing.
    """
    import scipy.stats  # noqa: F401, PLC0415 - slow to import; few commands decide


@lru_cache(maxsize=100_000)
def _find_p_value(passed: int, judged: int, other_passed: int, other_judged: int) -> float:
    """Boschloo's one-sided p-value for passing more often than the other; 1 if it does not."""
    if passed * other_judged <= other_passed * judged:
        return 1.0
    from scipy.stats import boschloo_exact  # noqa: PLC0415 - slow to import; few commands decide

    table = [[passed, other_passed], [judged - passed, other_judged - other_passed]]
    return float(boschloo_exact(table, alternative="greater", n=16).pvalue)


@lru_cache(maxsize=10_000)
def wilson_interval(
    num_passed: int, num_judged: int, *, confidence: float = 0.95
) -> tuple[float, float] | None:
    """The interval of a pass rate (Wilson, 1927); None if nothing is judged.

    Raises ValueError for counts that cannot be, and for a confidence outside 0 to 1.
    """
    _check_counts({"": (num_passed, num_judged)})
    if num_judged == 0:
        return None
    from scipy.stats import binomtest  # noqa: PLC0415 - slow to import; few commands decide

    interval = binomtest(num_passed, num_judged).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def _passes_often(passed: int, judged: int, min_pass_rate: float) -> bool:
    interval = wilson_interval(passed, judged)
    return interval is not None and interval[0] >= min_pass_rate


# -- how many more seeds


def _find_more_seeds(kept: Counts, level: float, min_pass_rate: float) -> int | None:
    """The seeds up to the first planned look that probably rules out all but the leader.

    If one arm is left, up to the look at which it probably passes often enough. The pass rates
    are taken as (passed + 1/2) / (judged + 1). None if no planned look reaches the power.
    """
    rates = {arm: (passed + 0.5) / (judged + 1) for arm, (passed, judged) in kept.items()}
    leader = max(rates, key=lambda arm: rates[arm], default=None)
    if leader is None or not kept[leader][1]:
        return None
    others = tuple(sorted(rate for arm, rate in rates.items() if arm != leader))
    if others and others[-1] == rates[leader]:
        return None
    for look in (look for look in PLANNED_LOOKS if look > kept[leader][1]):
        if _find_power(look, rates[leader], others, level, min_pass_rate) >= POWER:
            return look - kept[leader][1]
    return None


@lru_cache(maxsize=10_000)
def _find_power(
    num_seeds: int, rate: float, others: tuple[float, ...], level: float, min_pass_rate: float
) -> float:
    """The chance that an arm of this rate rules out all others, if each has so many seeds."""
    from scipy.stats import binom  # noqa: PLC0415 - slow to import; few commands decide

    passed = range(num_seeds + 1)
    chances = binom.pmf(passed, num_seeds, rate)
    if not others:
        is_enough = [_passes_often(number, num_seeds, min_pass_rate) for number in passed]
        return float(chances @ is_enough)
    num_beaten = _find_num_beaten(num_seeds, level)
    for other in others:
        chances = chances * binom.cdf([number - 1 for number in num_beaten], num_seeds, other)
    return float(chances.sum())


@lru_cache(maxsize=1_000)
def _find_num_beaten(num_seeds: int, level: float) -> list[int]:
    """For each number of passed seeds how many counts, from 0, of another arm it rules out.

    Boschloo's test orders the tables by Fisher's p-value. What it rejects is therefore every table
    up to a certain one, which bisection finds with few p-values of the test itself.
    """
    tables = _order_tables(num_seeds)
    num_rejected = bisect_right(
        tables, level, key=lambda table: _find_p_value(table[0], num_seeds, table[1], num_seeds)
    )
    num_beaten = [0] * (num_seeds + 1)
    for passed, _ in tables[:num_rejected]:
        num_beaten[passed] += 1
    return num_beaten


def _order_tables(num_seeds: int) -> list[Count]:
    """The passed seeds of an arm and of another that passed less often, by Fisher's p-value."""
    from scipy.stats import hypergeom  # noqa: PLC0415 - slow to import; few commands decide

    tables = [(first, second) for first in range(num_seeds + 1) for second in range(first)]
    least = [first - 1 for first, _ in tables]
    p_values = hypergeom.sf(least, 2 * num_seeds, num_seeds, [sum(table) for table in tables])
    # Tables that mirror each other differ by rounding only.
    keys = [float(f"{p_value:.9e}") for p_value in p_values]
    return [table for _, table in sorted(zip(keys, tables, strict=True))]
