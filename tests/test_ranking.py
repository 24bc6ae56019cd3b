"""The order of jobs, the recommendation, and the settings in which they differ."""

from datetime import timedelta
from typing import Any

import pytest
from artificial_runs import BLACK, HEALTHY_LOSSES, history, make_job

from server.judging.criteria import CriteriaSet
from server.judging.ranking import JudgedJob, find_differences, rank
from server.judging.verdicts import judge
from server.models.columns import utc_now
from server.models.options import BuiltInOption
from server.models.tables import FailureKind, Job, JobStatus


def rank_entry(
    job: Job, *, criteria_set: CriteriaSet = CriteriaSet.spec, **series: list[Any]
) -> JudgedJob:
    epochs = history(is_measured=True, **series)
    return JudgedJob(job, judge(job, epochs, criteria_set=criteria_set), epochs)


def test_evidence_ranks_by_what_is_known_of_colours_not_by_what_argmax_paints() -> None:
    first, second = make_job(id="a" * 12), make_job(id="b" * 12)
    entries = [
        rank_entry(job, criteria_set=CriteriaSet.evidence,
                   val_foreground_iou=[iou] * 3, val_colour_ap=[precision] * 3)
        for job, iou, precision in ((first, 0.9, 0.3), (second, 0.1, 0.35))
    ]  # fmt: skip
    result = rank(entries)
    assert result.ranking == [second.id, first.id]
    assert "passed all 8 criteria with a colour AP of 0.35" in result.reason


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (JobStatus.failed, FailureKind.numeric),
        (JobStatus.failed, FailureKind.oom),
        (JobStatus.cancelled, None),
        (JobStatus.running, None),
    ],
)
def test_run_that_did_not_finish_never_ranks_above_one_that_did(
    status: JobStatus, kind: FailureKind | None
) -> None:
    """After three epochs it may have passed more criteria than a run of fifty."""
    stopped = make_job(status, id="a" * 12, epochs=50, failure_kind=kind)
    finished = make_job(id="b" * 12)
    bad = {**BLACK, "train_pixel_accuracy": [0.5, 0.9, 0.2], "val_kl_per_dimension": [[0.0]] * 3}
    assert rank(
        [rank_entry(stopped, train_loss=[1.0] * 3), rank_entry(finished, **bad)]
    ).ranking == [
        finished.id,
        stopped.id,
    ]


def test_rank_is_by_criteria_then_iou_then_age_and_recommends_the_first_success() -> None:
    now = utc_now()
    collapsed = make_job(id="aaaaaaaaaaaa", option=BuiltInOption.a)
    good = make_job(id="bbbbbbbbbbbb", created_at=now)
    better = make_job(id="cccccccccccc")
    twin = make_job(id="dddddddddddd", created_at=now - timedelta(seconds=1))
    ious = {collapsed.id: 0.9, good.id: 0.2, better.id: 0.3, twin.id: 0.2}
    result = rank(
        [
            *(
                rank_entry(job, val_foreground_iou=[ious[job.id]] * 3)
                for job in (good, better, twin)
            ),
            rank_entry(collapsed, **BLACK | {"val_foreground_iou": [0.9] * 3}),
        ]
    )
    assert result.ranking == [better.id, good.id, twin.id, collapsed.id]
    assert result.recommendation is not None
    assert (result.recommendation.job_id, result.recommendation.option) == (better.id, "b")
    assert "passed all 6 criteria with a foreground IoU of 0.30" in result.reason
    assert result.reason.endswith("ahead of 2 other jobs that passed all of them")


@pytest.mark.parametrize(
    ("num_jobs", "words"),
    [(1, "the only one to do so"), (2, "ahead of 1 other job that passed all of them")],
)
def test_recommendation_counts_the_others_that_passed(num_jobs: int, words: str) -> None:
    jobs = [make_job(id=letter * 12) for letter in "ab"[:num_jobs]]
    entries = [rank_entry(job, train_recon_loss=HEALTHY_LOSSES) for job in jobs]
    assert rank(entries).reason.endswith(words)


def test_without_a_success_the_reason_says_what_the_best_missed() -> None:
    job = make_job(option=BuiltInOption.a)
    result = rank([rank_entry(job, **BLACK)])
    assert result.recommendation is None
    assert "not_mode_collapsed" in result.reason


def test_jobs_under_way_are_named_as_the_reason() -> None:
    job = make_job(JobStatus.running)
    result = rank([rank_entry(job, train_loss=[1.0])])
    assert result.recommendation is None
    assert "not ended yet" in result.reason


def test_differences_are_the_settings_that_differ() -> None:
    first = make_job(id="a" * 12, option=BuiltInOption.a, config={"beta": 1.0, "seed": 1})
    second = make_job(id="b" * 12, config={"beta": 2.0, "seed": 1})
    assert find_differences([first, second]) == {
        "option": {"a" * 12: "a", "b" * 12: "b"},
        "beta": {"a" * 12: 1.0, "b" * 12: 2.0},
    }
    assert find_differences([first]) == {}
