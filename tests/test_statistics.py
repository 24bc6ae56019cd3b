"""Which arms are ruled out, whether one is recommended, and how often that is wrong."""

import math
import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from statistics import median

import pytest
from fastapi import APIRouter
from fastapi.routing import APIRoute
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, boschloo_exact

from server.api.routes import comparisons, studies, study_reports
from server.dashboard.pages import study as study_page
from server.judging import statistics
from server.judging.intervals import paired_difference
from server.judging.statistics import (
    Decision,
    DecisionState,
    decide,
    decide_in_looks,
    load_library,
    plan_looks,
    wilson_interval,
)

LOOKS = (5, 10, 20, 40)
Counts = Mapping[str, tuple[int, int]]


def repeat(passed: int, judged: int) -> list[bool]:
    return [True] * passed + [False] * (judged - passed)


def draw(generator: random.Random, chances: Sequence[float]) -> dict[str, list[bool]]:
    """Each arm's forty seeds, by its chance to pass."""
    return {
        f"arm {number}": [generator.random() < chance for _ in range(LOOKS[-1])]
        for number, chance in enumerate(chances)
    }


def list_out(decision: Decision) -> list[str]:
    return [entry.arm for entry in decision.ruled_out]


# -- one look


def test_arm_that_passes_always_is_decided_against_one_that_never_does() -> None:
    decision = decide({"good": (10, 10), "bad": (0, 10)})
    assert (decision.state, decision.arm) == (DecisionState.decided, "good")
    assert (decision.kept, decision.more_seeds) == (["good"], 0)
    (out,) = decision.ruled_out
    expected = boschloo_exact([[10, 0], [0, 10]], alternative="greater", n=16).pvalue
    assert (out.arm, out.by, out.num_seeds) == ("bad", "good", 10)
    assert out.p_value == pytest.approx(expected)


def test_three_seeds_a_side_decide_nothing_at_four_looks() -> None:
    decision = decide({"good": (3, 3), "bad": (0, 3)})
    assert (decision.state, decision.ruled_out) == (DecisionState.undecided, [])


def test_five_seeds_decide_between_always_and_never_at_four_looks() -> None:
    assert decide({"good": (5, 5), "bad": (0, 5)}).state == DecisionState.decided


def test_three_seeds_are_too_few_to_be_decided() -> None:
    decision = decide({"good": (3, 3), "bad": (0, 3)}, num_looks=1)
    assert (decision.state, decision.kept) == (DecisionState.narrowed, ["good"])
    assert decide({"good": (4, 4), "bad": (0, 4)}, num_looks=1).state == DecisionState.decided


@pytest.mark.parametrize(("num_arms", "num_out"), [(13, 1), (14, 0)])
def test_five_seeds_rule_out_an_arm_of_up_to_thirteen(num_arms: int, num_out: int) -> None:
    counts = {f"arm {number}": (5, 5) for number in range(num_arms - 1)} | {"bad": (0, 5)}
    assert len(decide(counts).ruled_out) == num_out


@pytest.mark.parametrize(
    ("counts", "state"),
    [
        ({}, DecisionState.no_data),
        ({"a": (0, 0)}, DecisionState.no_data),
        ({"a": (0, 0), "b": (0, 0)}, DecisionState.no_data),
        ({"a": (0, 10), "b": (0, 10)}, DecisionState.none),
        ({"a": (0, 10), "b": (0, 0)}, DecisionState.none),
        ({"a": (0, 1)}, DecisionState.none),
        ({"a": (8, 10), "b": (7, 10)}, DecisionState.undecided),
        ({"a": (10, 10), "b": (0, 0)}, DecisionState.undecided),
        ({"a": (10, 10), "b": (10, 10), "c": (0, 10)}, DecisionState.narrowed),
        ({"a": (5, 5)}, DecisionState.decided),
        ({"a": (3, 5)}, DecisionState.undecided),
    ],
)
def test_state_follows_from_the_counts(counts: Counts, state: DecisionState) -> None:
    decision = decide(counts)
    assert decision.state == state
    assert (decision.arm is not None) == (state == DecisionState.decided)


def test_arm_that_is_left_but_passes_too_rarely_is_not_recommended() -> None:
    counts = {"rare": (18, 40), "never": (0, 40)}
    decision = decide(counts)
    assert (decision.state, decision.kept, decision.arm) == ("narrowed", ["rare"], None)
    assert decide(counts, min_pass_rate=0.3).state == DecisionState.decided


def test_two_good_arms_of_four_are_told_to_need_more_seeds_than_any_look_has() -> None:
    decision = decide({"b": (39, 40), "b2": (40, 40), "a": (0, 40), "c": (0, 40)})
    assert (decision.state, decision.kept) == (DecisionState.narrowed, ["b", "b2"])
    assert decision.more_seeds is None


def test_ruled_out_arm_names_the_arm_of_the_smallest_p_value() -> None:
    decision = decide({"middle": (32, 40), "bad": (2, 40), "best": (40, 40)})
    (by,) = (entry.by for entry in decision.ruled_out if entry.arm == "bad")
    assert by == "best"


def test_arm_with_fewer_judged_seeds_is_compared_with_what_it_has() -> None:
    (out,) = decide({"good": (10, 10), "bad": (0, 7), "new": (0, 0)}).ruled_out
    expected = boschloo_exact([[10, 0], [0, 7]], alternative="greater", n=16).pvalue
    assert (out.arm, out.num_seeds) == ("bad", 7)
    assert out.p_value == pytest.approx(expected)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 10), min_size=2, max_size=5), st.randoms())
def test_decision_does_not_depend_on_names_and_order(
    passed: list[int], order: random.Random
) -> None:
    counts = {f"arm {number}": (count, 10) for number, count in enumerate(passed)}
    shuffled = dict(order.sample(list(counts.items()), len(counts)))
    one, other = decide(counts), decide(shuffled)
    assert (one.state, one.arm, one.more_seeds) == (other.state, other.arm, other.more_seeds)
    assert sorted(one.kept) == sorted(other.kept)
    p_values = [{entry.arm: entry.p_value for entry in each.ruled_out} for each in (one, other)]
    assert p_values[0] == p_values[1]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(9, 11)), min_size=2, max_size=4),
    st.sampled_from([1, 4]),
)
def test_arm_is_ruled_out_exactly_if_some_other_is_significantly_better(
    pairs: list[tuple[int, int]], num_looks: int
) -> None:
    counts = {f"arm {number}": pair for number, pair in enumerate(pairs)}
    level = 0.05 / (num_looks * (len(counts) - 1))
    smallest = {
        arm: min(
            boschloo_exact(
                [[by[0], count[0]], [by[1] - by[0], count[1] - count[0]]],
                alternative="greater",
                n=16,
            ).pvalue
            for other, by in counts.items()
            if other != arm and by[0] * count[1] > count[0] * by[1]
        )
        for arm, count in counts.items()
        if any(by[0] * count[1] > count[0] * by[1] for by in counts.values())
    }
    expected = {arm: p_value for arm, p_value in smallest.items() if p_value <= level}
    found = {entry.arm: entry.p_value for entry in decide(counts, num_looks=num_looks).ruled_out}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("arguments", [{"error": 0}, {"error": 1}, {"error": math.nan}])
@pytest.mark.parametrize("counts", [{}, {"a": (1, 2)}])
def test_error_out_of_range_is_refused(counts: Counts, arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="error"):
        decide(counts, **arguments)


@pytest.mark.parametrize("count", [(3, 2), (-1, 2), (0, -1), (-2, -1)])
def test_counts_that_cannot_be_are_refused(count: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="cannot have passed"):
        decide({"a": count})
    with pytest.raises(ValueError, match="cannot have passed"):
        wilson_interval(*count)


def test_looks_and_rates_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="look"):
        decide({"a": (1, 2)}, num_looks=0)
    with pytest.raises(ValueError, match="pass rate"):
        decide({"a": (1, 2)}, min_pass_rate=1.1)
    for looks in ([0], [5, 5], [10, 5]):
        with pytest.raises(ValueError, match="rising"):
            decide_in_looks({"a": [True]}, looks=looks)


# -- looks


@pytest.mark.parametrize(
    ("num_seeds", "looks"),
    [
        (1, [1]),
        (3, [3]),
        (5, [5]),
        (12, [5, 10, 12]),
        (40, [5, 10, 20, 40]),
        (100, [5, 10, 20, 40, 100]),
    ],
)
def test_looks_are_planned_as_far_as_the_seeds_go(num_seeds: int, looks: list[int]) -> None:
    assert plan_looks(num_seeds) == looks


def test_study_without_seeds_has_no_looks() -> None:
    with pytest.raises(ValueError, match="at least one seed"):
        plan_looks(0)


def test_study_before_its_first_look_keeps_every_arm() -> None:
    sequence = decide_in_looks({"a": [True] * 4, "b": []}, looks=[], num_planned_looks=4)
    assert (sequence.looks, sequence.decision.kept) == ([], ["a", "b"])
    assert sequence.decision.state == DecisionState.no_data


def test_first_look_decides_as_the_counts_do() -> None:
    results = {"a": repeat(5, 5), "b": repeat(1, 5), "c": repeat(0, 5)}
    sequence = decide_in_looks(results, looks=[5], num_planned_looks=4)
    assert sequence.decision == decide({"a": (5, 5), "b": (1, 5), "c": (0, 5)}, num_looks=4)


def test_look_uses_the_first_seeds_only() -> None:
    results = {"a": [*repeat(5, 5), False], "b": [*repeat(0, 5), True]}
    (look,) = decide_in_looks(results, looks=[5]).looks
    assert [entry.arm for entry in look.ruled_out] == ["b"]


def test_arm_that_was_ruled_out_stays_out_with_the_numbers_of_that_look() -> None:
    late = [*repeat(0, 5), *repeat(35, 35)]
    results = {"a": repeat(40, 40), "b": late}
    sequence = decide_in_looks(results, looks=LOOKS)
    (out,) = sequence.decision.ruled_out
    assert (out.arm, out.num_seeds) == ("b", 5)
    assert [len(look.ruled_out) for look in sequence.looks] == [1, 0, 0, 0]
    assert decide({"a": (40, 40), "b": (35, 40)}).ruled_out == []


def test_arm_that_was_ruled_out_rules_out_no_other() -> None:
    late = [*repeat(0, 5), *repeat(35, 35)]
    fading = [*repeat(5, 5), *repeat(0, 35)]
    middle = [*repeat(3, 5), *repeat(2, 35)]
    results = {"late": late, "fading": fading, "middle": middle}
    sequence = decide_in_looks(results, looks=[5, 40], num_planned_looks=2)
    assert list_out(sequence.decision) == ["late"]
    counts = {arm: (sum(seeds), len(seeds)) for arm, seeds in results.items()}
    assert sorted(list_out(decide(counts, num_looks=2))) == ["fading", "middle"]


def test_level_stays_that_of_all_arms_and_planned_looks() -> None:
    results = {"a": repeat(5, 5), "b": repeat(0, 5)}
    p_value = boschloo_exact([[5, 0], [0, 5]], alternative="greater", n=16).pvalue
    others = {f"arm {number}": repeat(4, 5) for number in range(20)}
    assert 0.05 / (4 * 21) < p_value < 0.05 / 4
    assert list_out(decide_in_looks(results, looks=[5], num_planned_looks=4).decision) == ["b"]
    many = decide_in_looks(results | others, looks=[5], num_planned_looks=4)
    assert list_out(many.decision) == []
    watched = decide_in_looks(results, looks=[5], num_planned_looks=100)
    assert list_out(watched.decision) == []


def test_race_ends_at_the_look_that_decides() -> None:
    results = {"a": repeat(40, 40), "b": repeat(0, 40)}
    race = decide_in_looks(results, looks=LOOKS, is_race=True)
    assert [look.num_seeds for look in race.looks] == [5]
    assert race.decision.state == DecisionState.decided
    assert len(decide_in_looks(results, looks=LOOKS).looks) == 4


def test_race_goes_on_while_the_arm_that_is_left_has_not_passed_often_enough() -> None:
    results = {"a": [False, *repeat(39, 39)], "b": repeat(0, 5)}
    started = decide_in_looks(results, looks=[5], num_planned_looks=4, is_race=True).decision
    assert (started.state, started.kept) == (DecisionState.narrowed, ["a"])
    race = decide_in_looks(results, looks=LOOKS, is_race=True)
    assert [look.num_seeds for look in race.looks] == [5, 10]
    assert (race.decision.state, race.decision.arm) == (DecisionState.decided, "a")


def test_arm_with_fewer_seeds_than_the_look_uses_what_it_has() -> None:
    results = {"a": repeat(10, 10), "b": repeat(0, 8)}
    (out,) = decide_in_looks(results, looks=[10]).decision.ruled_out
    expected = boschloo_exact([[10, 0], [0, 8]], alternative="greater", n=16).pvalue
    assert out.num_seeds == 10
    assert out.p_value == pytest.approx(expected)


# -- the error


def measure_error(
    num_arms: int, chance: float, *, num_planned_looks: int = 4, error: float = 0.05
) -> float:
    """How often one of equal arms is ruled out, in 400 studies, looked at four times.

    Each of the arms is as good as the best, so that the mean over them is that of the best.
    """
    generator, num_studies, num_out = random.Random(3), 400, 0
    for _ in range(num_studies):
        results = draw(generator, [chance] * num_arms)
        sequence = decide_in_looks(
            results, looks=LOOKS, num_planned_looks=num_planned_looks, error=error
        )
        num_out += len(sequence.decision.ruled_out)
    return num_out / (num_studies * num_arms)


@pytest.mark.parametrize("chance", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("num_arms", [2, 3, 10])
def test_best_of_equal_arms_is_ruled_out_in_at_most_5_percent_of_studies(
    num_arms: int, chance: float
) -> None:
    assert measure_error(num_arms, chance) <= 0.05


def test_error_would_be_too_large_without_the_correction_for_looks() -> None:
    assert measure_error(2, 0.5, num_planned_looks=1) > 0.08


def test_error_would_be_too_large_without_the_correction_for_arms() -> None:
    assert measure_error(10, 0.5, error=0.05 * 9) > 0.08


# -- how many more seeds


def test_more_seeds_is_the_first_look_with_power_of_80_percent() -> None:
    powers = [find_power(num_seeds, (3.5 / 4, 0.5 / 4), 0.05 / 4) for num_seeds in (5, 10)]
    assert powers[0] < 0.8 < powers[1]
    assert decide({"a": (3, 3), "b": (0, 3)}).more_seeds == 10 - 3
    assert decide({"a": (7, 10), "b": (3, 10)}).more_seeds == 40 - 10


def find_power(num_seeds: int, rates: Sequence[float], level: float) -> float:
    """The power over the second arm, by each table's own test."""
    counts = range(num_seeds + 1)
    return sum(
        float(binom.pmf(first, num_seeds, rates[0]) * binom.pmf(second, num_seeds, rates[1]))
        for first in counts
        for second in range(first)
        if statistics._find_p_value(first, num_seeds, second, num_seeds) <= level
    )


@pytest.mark.parametrize("num_seeds", [5, 10, 20])
@pytest.mark.parametrize("level", [0.05, 0.0125, 0.05 / 76])
def test_rejected_tables_are_those_whose_p_value_is_small_enough(
    num_seeds: int, level: float
) -> None:
    expected = [
        sum(
            statistics._find_p_value(first, num_seeds, second, num_seeds) <= level
            for second in range(first)
        )
        for first in range(num_seeds + 1)
    ]
    assert statistics._find_num_beaten(num_seeds, level) == expected


@pytest.mark.parametrize(
    ("counts", "more_seeds"),
    [
        ({"a": (0, 0), "b": (0, 0)}, None),
        ({"a": (0, 5), "b": (0, 5)}, None),  # equal: no number of seeds tells them apart
        ({"a": (4, 5), "b": (4, 5)}, None),
        ({"a": (8, 10), "b": (7, 10)}, None),  # too close for 40 seeds
        ({"a": (5, 5), "b": (4, 5), "c": (0, 5)}, None),
        ({"a": (9, 10), "b": (4, 10), "c": (0, 10)}, 30),  # c is out already
        ({"a": (4, 5)}, 35),  # nothing to rule out: until it passes often enough
        ({"a": (2, 5)}, None),
        ({"a": (45, 50), "b": (37, 50)}, None),  # no planned look is left
        ({"a": (5, 5), "b": (0, 0)}, 35),
    ],
)
def test_more_seeds_of_the_arms_that_are_kept(counts: Counts, more_seeds: int | None) -> None:
    assert decide(counts).more_seeds == more_seeds


def test_more_seeds_is_found_within_half_a_second() -> None:
    statistics._find_p_value.cache_clear()
    statistics._find_num_beaten.cache_clear()
    statistics._find_power.cache_clear()
    started = time.process_time()
    decide({f"arm {number}": (number % 4, 4) for number in range(20)})
    assert time.process_time() - started < 0.5


# -- intervals


@pytest.mark.parametrize(
    ("passed", "judged", "low", "high"),
    [(5, 5, 0.57, 1), (0, 5, 0, 0.43), (10, 10, 0.72, 1), (0, 1, 0, 0.79)],
)
def test_wilson_interval_is_the_published_one(
    passed: int, judged: int, low: float, high: float
) -> None:
    assert wilson_interval(passed, judged) == pytest.approx((low, high), abs=0.005)


def test_nothing_judged_has_no_interval() -> None:
    assert wilson_interval(0, 0) is None


def test_paired_difference_is_the_same_each_time() -> None:
    first, second = [0.61, 0.64, 0.59, 0.7, 0.66, 0.62], [0.4, 0.45, 0.5, 0.41, 0.48, 0.44]
    difference = paired_difference(first, second)
    assert difference is not None
    assert difference == paired_difference(first, second)
    assert 0 < difference.low <= difference.median <= difference.high
    assert (difference.num_pairs, difference.method) == (6, "BCa")


def test_equal_differences_have_an_interval_of_one_point() -> None:
    difference = paired_difference([1.5] * 5, [1.0] * 5)
    assert difference is not None
    assert (difference.low, difference.median, difference.high) == (0.5, 0.5, 0.5)
    assert difference.method == "percentile"


def test_four_pairs_have_no_interval() -> None:
    assert paired_difference([1, 2, 3, 4], [0, 0, 0, 0]) is None


def test_pairs_that_are_not_finite_are_left_out() -> None:
    first = [1.0, 2, 3, 4, 5, math.nan, math.inf]
    difference = paired_difference(first, [0.0] * 6 + [math.inf])
    assert difference is not None
    assert (difference.median, difference.num_pairs) == (3, 5)
    assert paired_difference(first[1:], [0.0] * 5 + [math.inf]) is None


def test_pairs_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError):
        paired_difference([1.0] * 5, [1.0] * 6)


def test_confidence_out_of_range_is_refused() -> None:
    for confidence in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="confidence"):
            paired_difference([1.0] * 5, [1.0] * 5, confidence=confidence)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([-1e300, -1.0, 0.0, 0.0, 1e-9, 1.0]), min_size=5, max_size=12))
def test_any_differences_have_an_interval_without_warnings(values: list[float]) -> None:
    difference = paired_difference(values, [0.0] * len(values))
    assert difference is not None
    assert math.isfinite(difference.low) and math.isfinite(difference.high)
    assert difference.low <= difference.high
    assert difference.median == median(values)


# -- imports


def test_scipy_is_not_imported_before_a_decision() -> None:
    check = "import sys, server.judging.statistics; sys.exit('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_steps_of_the_optimizer_stay_out_of_the_log() -> None:
    program = (
        "from server.logs import configure_logging; configure_logging(as_json=False); "
        "from server.judging.statistics import decide; decide({'a': (9, 10), 'b': (3, 10)}); "
        "import logging; logging.info('from the root')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert [line.rpartition(": ")[2] for line in done.stdout.splitlines()] == ["from the root"]


@pytest.mark.parametrize(
    "router",
    [studies.router, study_reports.router, comparisons.router, study_page.router],
    ids=["studies", "reports", "comparisons", "page"],
)
def test_library_is_imported_before_a_route_opens_a_transaction(router: APIRouter) -> None:
    assert router.routes
    for route in router.routes:
        assert isinstance(route, APIRoute)
        first = route.dependant.dependencies[0]
        assert first.call is load_library, route.path
