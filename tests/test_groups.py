"""The jobs of one configuration, judged together, and what may be said about arms."""

import pytest
from study_results import ENDINGS, FIRST_END, NUM_EPOCHS, make_epochs

from server.judging.criteria import (
    CriteriaSet,
    CriterionName,
    Diagnosis,
    Thresholds,
    list_criteria,
)
from server.judging.decisions import ArmCount, join_names, recommend
from server.judging.groups import GroupMetric, GroupVerdict, SeedResult, judge_group
from server.judging.histories import EpochSummary
from server.judging.statistics import decide, decide_in_looks
from server.models.configuration import TrainingConfig
from server.models.tables import Job, JobStatus

LIVE = {"q": JobStatus.queued, "r": JobStatus.running}


def make_result(
    seed: int,
    letter: str,
    *,
    criteria_set: CriteriaSet = CriteriaSet.spec,
    **final: float | None,
) -> SeedResult:
    """A seed that ended as a letter of `ENDINGS` says, waits (q), runs (r) or was deleted (d)."""
    if letter == "d":
        return SeedResult(seed=seed)
    job = Job(
        id=f"{seed:012x}",
        option="b",
        config=TrainingConfig(epochs=NUM_EPOCHS).model_dump(mode="json"),
        progress=0.5,
        ended_at=FIRST_END,
        epochs_completed=NUM_EPOCHS,
        **ENDINGS.get(letter) or {"status": LIVE[letter]},
    )
    rows = make_epochs(job.id, is_healthy=letter != "f")
    rows[-1] |= final
    epochs = [
        EpochSummary(**{name: row[name] for name in EpochSummary._fields if name in row})
        for row in rows
    ]
    return SeedResult.of(job, epochs, seed=seed, thresholds=Thresholds(), criteria_set=criteria_set)


def judge(letters: str, *, criteria_set: CriteriaSet = CriteriaSet.spec) -> GroupVerdict:
    results = [
        make_result(seed, letter, criteria_set=criteria_set) for seed, letter in enumerate(letters)
    ]
    return judge_group(results, criteria_set=criteria_set)


def test_group_counts_the_seeds_that_pass_every_criterion() -> None:
    group = judge("pfp")
    assert (group.num_passed, group.num_judged, group.num_missing) == (2, 3, 0)
    assert group.pass_rate == pytest.approx(2 / 3)
    assert group.pass_rate_interval == pytest.approx((0.2077, 0.9385), abs=1e-4)
    assert group.diagnoses == {Diagnosis.healthy: 2, Diagnosis.decision_collapse: 1}
    passed = {each.name: (each.num_passed, each.num_judged) for each in group.criteria}
    assert passed[CriterionName.not_mode_collapsed] == (2, 3)
    assert passed[CriterionName.completed] == (3, 3)


def test_diverged_seed_counts_against_its_group() -> None:
    group = judge("pn")
    assert (group.num_passed, group.num_judged, group.num_missing) == (1, 2, 0)
    assert group.diagnoses == {Diagnosis.healthy: 1, Diagnosis.diverged: 1}


@pytest.mark.parametrize("letter", ["o", "u", "t", "i", "c", "d"])
def test_seed_that_was_lost_is_missing_and_not_failed(letter: str) -> None:
    group = judge("p" + letter)
    assert (group.num_passed, group.num_judged, group.num_missing) == (1, 1, 1)
    assert group.metrics[GroupMetric.val_foreground_iou].values == [0.2, None]
    assert group.diagnoses == {Diagnosis.healthy: 1}


@pytest.mark.parametrize("letter", ["q", "r"])
def test_seed_that_has_not_ended_counts_as_nothing_yet(letter: str) -> None:
    group = judge("p" + letter)
    assert (group.num_passed, group.num_judged, group.num_missing) == (1, 1, 0)


def test_group_without_results_has_no_rate() -> None:
    group = judge("qc")
    assert (group.num_judged, group.pass_rate, group.pass_rate_interval) == (0, None, None)
    assert group.median_job_id is None
    assert all(each.median is None for each in group.metrics.values())


def test_values_are_in_the_order_of_the_seeds_with_median_and_range() -> None:
    values = [0.3, 0.1, None, 0.2]
    results = [
        make_result(seed, "q" if value is None else "p", val_foreground_iou=value)
        for seed, value in enumerate(values)
    ]
    group = judge_group(results, criteria_set=CriteriaSet.spec)
    summary = group.metrics[GroupMetric.val_foreground_iou]
    assert (summary.values, summary.median, summary.min, summary.max) == (values, 0.2, 0.1, 0.3)
    assert group.median_job_id == results[3].job_id
    assert group.worst_job_id == results[1].job_id


def test_group_has_the_criteria_of_its_set_only() -> None:
    for criteria_set in CriteriaSet:
        names = [each.name for each in judge("pf", criteria_set=criteria_set).criteria]
        assert names == list_criteria(criteria_set)


def test_run_that_knows_as_much_but_paints_nothing_fails_by_what_it_paints_alone() -> None:
    group = judge("pf", criteria_set=CriteriaSet.evidence)
    passed = {each.name: each.num_passed for each in group.criteria}
    assert (group.num_passed, passed[CriterionName.informative]) == (1, 2)
    assert passed[CriterionName.paints_truthfully] == 1
    assert group.diagnoses == {Diagnosis.healthy: 1, Diagnosis.decision_collapse: 1}


def test_median_run_by_evidence_is_that_of_the_colours() -> None:
    values = [(0.3, 0.1), (0.1, 0.3), (0.2, 0.2)]
    by_set = {}
    for criteria_set in CriteriaSet:
        results = [
            make_result(seed, "p", criteria_set=criteria_set,
                        val_foreground_iou=iou, val_colour_ap=precision)
            for seed, (iou, precision) in enumerate(values)
        ]  # fmt: skip
        group = judge_group(results, criteria_set=criteria_set)
        assert group.median_job_id == results[2].job_id
        by_set[criteria_set] = group.worst_job_id
    assert by_set == {CriteriaSet.spec: "0" * 11 + "1", CriteriaSet.evidence: "0" * 12}


@pytest.mark.parametrize("criteria_set", CriteriaSet)
def test_run_that_diverged_is_the_worst_whatever_it_had_reached(criteria_set: CriteriaSet) -> None:
    results = [
        make_result(0, "p", criteria_set=criteria_set),
        make_result(1, "n", criteria_set=criteria_set, val_foreground_iou=0.9, val_colour_ap=0.9),
        make_result(2, "p", criteria_set=criteria_set),
    ]
    group = judge_group(results, criteria_set=criteria_set)
    assert group.worst_job_id == results[1].job_id
    assert group.median_job_id == results[0].job_id


def test_metrics_that_old_runs_lack_are_left_out() -> None:
    nothing = {"val_foreground_ap": None, "val_colour_ap": None, "val_mutual_information": None}
    results = [make_result(0, "p", **nothing), make_result(1, "p", val_mutual_information=8.5)]
    group = judge_group(results, criteria_set=CriteriaSet.spec)
    assert group.metrics[GroupMetric.val_mutual_information].values == [None, 8.5]
    assert group.metrics[GroupMetric.val_foreground_ap].values == [None, 0.5]


# -- in words


def explain(counts: dict[str, tuple[int, int]], *, num_looks: int = 4) -> str:
    found = {arm: ArmCount(*count) for arm, count in counts.items()}
    return recommend(decide(counts, num_looks=num_looks), found).reason


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        (
            {"a": (0, 10), "b": (10, 10), "c": (0, 10)},
            "b escapes collapse, 10 of 10; a and c are ruled out, p < 0.001",
        ),
        ({"a": (2, 10), "b": (10, 10)}, "b escapes collapse, 10 of 10; a is ruled out, p < 0.001"),
        ({"a": (4, 10), "b": (10, 10)}, "b escapes collapse, 10 of 10; a is ruled out, p = 0.0018"),
        (
            {"a": (2, 10), "b": (10, 10), "c": (4, 10)},
            "b escapes collapse, 10 of 10; a and c are ruled out, p ≤ 0.0018",
        ),
        ({"b": (10, 10)}, "b escapes collapse, 10 of 10"),
        (
            {"b": (4, 5)},
            "nothing is decided: b passed 4 of 5; after 5 seeds its pass rate may still be below "
            "one half; 35 more would probably settle it",
        ),
        (
            {"b": (9, 40)},
            "nothing is decided: b passed 9 of 40; its pass rate may still be below one half, so "
            "it is not recommended",
        ),
        ({"a": (0, 5), "b": (0, 5)}, "no arm passed once: a passed 0 of 5 and b passed 0 of 5"),
        ({"a": (0, 0), "b": (0, 0)}, "nothing was judged"),
        (
            {"a": (1, 5), "b": (4, 5)},
            "nothing is decided: a passed 1 of 5 and b passed 4 of 5; telling the two apart would "
            "probably take 15 more seeds of each",
        ),
        (
            {"a": (3, 5), "b": (3, 5)},
            "nothing is decided: a passed 3 of 5 and b passed 3 of 5; at these rates 40 seeds "
            "would hardly tell the two apart",
        ),
        (
            {"a": (39, 40), "b": (40, 40)},
            "nothing is decided: a passed 39 of 40 and b passed 40 of 40; 40 seeds of each do not "
            "tell the two apart",
        ),
        (
            {"a": (0, 40), "b": (39, 40), "d": (40, 40)},
            "b and d escape collapse, 39 and 40 of 40; a is ruled out, p < 0.001; 40 seeds of each "
            "do not tell the two apart",
        ),
        (
            {"a": (0, 10), "b": (10, 10), "d": (0, 0)},
            "b and d are left: b passed 10 of 10 and d passed 0 of 0; a is ruled out, p < 0.001; "
            "no seed of d was judged",
        ),
    ],
)
def test_sentence_says_what_the_counts_allow(
    counts: dict[str, tuple[int, int]], sentence: str
) -> None:
    assert explain(counts) == sentence


def test_sentence_by_evidence_does_not_speak_of_collapse() -> None:
    counts = {"a": ArmCount(0, 10), "b": ArmCount(10, 10), "c": ArmCount(9, 10)}
    for arms, words in ((("a", "b"), "b passes by evidence, 10"), ("abc", "b and c pass by ev")):
        found = {arm: counts[arm] for arm in arms}
        said = recommend(decide(found), found, criteria_set=CriteriaSet.evidence)
        assert said.reason.startswith(words)


def test_sentence_about_twenty_arms_names_only_some() -> None:
    counts = {f"arm {number}": (0, 40) for number in range(19)} | {"b": (40, 40)}
    assert explain(counts) == (
        "b escapes collapse, 40 of 40; arm 0, arm 1, arm 2, arm 3, arm 4 and 14 others are ruled "
        "out, p < 0.001"
    )
    assert explain(dict.fromkeys(counts, (0, 5))).endswith("arm 4 passed 0 of 5 and 15 others")


@pytest.mark.parametrize(
    ("next_look", "num_arms", "sentence"),
    [
        (5, 3, "nothing is decided yet: the first look is at 5 seeds of each arm"),
        (5, 1, "nothing is decided yet: the first look is at 5 seeds"),
        (1, 2, "nothing is decided yet: the first look is at 1 seed of each arm"),
        (None, 2, "nothing was decided: no look took place"),
    ],
)
def test_before_the_first_look_only_its_time_is_told(
    next_look: int | None, num_arms: int, sentence: str
) -> None:
    arms = [f"arm {number}" for number in range(num_arms)]
    decision = decide_in_looks({arm: [] for arm in arms}, looks=[]).decision
    counts = {arm: ArmCount(0, 0) for arm in arms}
    said = recommend(decision, counts, next_look=next_look, has_looked=False)
    assert (said.reason, said.arm, said.kept) == (sentence, None, arms)


def test_looks_that_were_not_planned_are_told() -> None:
    counts = {"a": (0, 10), "b": (10, 10)}
    found = {arm: ArmCount(*count) for arm, count in counts.items()}
    reason = recommend(decide(counts), found, has_late_looks=True).reason
    assert reason.endswith(
        "p < 0.001. Seeds were added later: the error of 5% holds for the looks that were planned"
    )


def test_names_are_joined_as_in_a_sentence() -> None:
    assert [join_names(list("abcdefgh"[:number])) for number in (0, 1, 2, 3, 6, 7)] == [
        "",
        "a",
        "a and b",
        "a, b and c",
        "a, b, c, d, e and f",
        "a, b, c, d, e and 2 others",
    ]
