"""Comparisons: verdicts of several jobs, their ranking, and the settings that differ.

Jobs of one configuration are also judged as a group, at one look: a single run cannot decide.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel, Field
from sqlmodel import Session

from server.judging.criteria import CriteriaSet, Criterion, CriterionName, Evidence, Thresholds
from server.judging.decisions import ArmCount, Recommendation, RuledOutArm, recommend
from server.judging.differences import rank_arms
from server.judging.groups import SeedResult, judge_group
from server.judging.histories import EpochSummary, read_histories, read_in_parts
from server.judging.ranking import JudgedJob, Ranking, find_differences, rank
from server.judging.statistics import DecisionState, decide
from server.judging.studies import ArmVerdict, describe_arm
from server.judging.verdicts import Verdict, assess, describe_verdict
from server.models.configuration import NOT_IDENTITY
from server.models.studies import Arm
from server.models.tables import Job

MAX_COMPARED_JOBS: Final = 100
#: Baselines in the curves; jobs on more than three different data sets are rare.
_MAX_BACKGROUND_SHARES: Final = 3


@dataclass(frozen=True, slots=True)
class ComparedJob:
    """A job of a comparison with its verdict and epochs; without curves, with the last one."""

    job: Job
    verdict: Verdict
    epochs: Sequence[EpochSummary]
    has_namesake: bool = False  # another compared job has the same name

    @property
    def title(self) -> str:
        """The job's name if it is unique in the comparison, else name and id, or only the id."""
        if self.job.name is None:
            return self.job.id
        return f"{self.job.name} ({self.job.id})" if self.has_namesake else self.job.name

    @property
    def label(self) -> str:
        return f"{self.job.option} · {self.title}"


class ComparisonRecommendation(BaseModel):
    """The best job, and what may be said about its option."""

    job_id: str = Field(description="the best run, or of several runs the median one")
    option: str
    reason: str
    state: DecisionState
    arm: str | None = Field(description="the recommended group; null unless decided")
    kept: list[str]
    ruled_out: list[RuledOutArm]
    error: float = Field(description="the largest chance that the best group is ruled out")
    more_seeds: int | None = Field(
        description="further seeds of each kept group that will probably decide; null if no "
        "planned number of seeds would"
    )


@dataclass(frozen=True, slots=True)
class Comparison:
    """Jobs with verdicts, their ranking and recommendation, and the settings that differ."""

    entries: list[ComparedJob]
    criteria_set: CriteriaSet
    thresholds: Thresholds
    ranking: Ranking
    differences: dict[str, dict[str, Any]]
    groups: list[ArmVerdict]
    decision: Recommendation  #: between the groups

    @property
    def recommendation(self) -> ComparisonRecommendation | None:
        """None if no run passed every criterion."""
        leader = next(iter(rank_arms(self.groups, criteria_set=self.criteria_set)), None)
        if leader is None or not leader.num_passed or leader.median_job_id is None:
            return None
        job_id, option = leader.median_job_id, leader.option
        if self.ranking.recommendation is not None and not self.has_repeats:
            job_id = self.ranking.recommendation.job_id
            option = self.ranking.recommendation.option
        decided = self.decision.model_dump(
            include={"state", "arm", "kept", "ruled_out", "error", "more_seeds"}
        )
        return ComparisonRecommendation(job_id=job_id, option=option, reason=self.reason, **decided)

    @property
    def has_repeats(self) -> bool:
        """Whether a group has more than one judged run."""
        return any(group.num_judged > 1 for group in self.groups)

    @property
    def reason(self) -> str:
        """Why a job is recommended, or why none is, and what may be said about the groups."""
        if self.has_repeats:
            return self.decision.reason
        if len(self.groups) < 2 or self.decision.state == DecisionState.no_data:
            return self.ranking.reason
        return f"{self.ranking.reason}; one run of each cannot decide: {_say_more(self.decision)}"

    @property
    def jobs(self) -> list[Job]:
        return [entry.job for entry in self.entries]

    @property
    def background_shares(self) -> list[float]:
        """The pixel accuracy of an all-background output on each of the jobs' data sets."""
        summaries = [job.dataset_summary or {} for job in self.jobs]
        known = [each["background_share"] for each in summaries if "background_share" in each]
        return sorted({round(share, 4) for share in known})[:_MAX_BACKGROUND_SHARES]

    def by_criterion(self) -> list[tuple[CriterionName, list[Criterion]]]:
        """Each criterion's name with its result for every job."""
        columns = [entry.verdict.criteria for entry in self.entries]
        return [(row[0].name, list(row)) for row in zip(*columns, strict=True)]


def compare(
    session: Session,
    jobs: Sequence[Job],
    *,
    thresholds: Thresholds,
    criteria_set: CriteriaSet,
    groups: Sequence[Sequence[Job]] | None = None,
    has_curves: bool = False,
) -> Comparison:
    """Judge jobs side by side, and `groups` of jobs of one configuration each.

    By default the groups are those among the jobs. The epochs of the jobs are kept only with
    `has_curves`: without them a comparison needs little memory.
    """
    groups = group_jobs(jobs) if groups is None else groups
    results: dict[str, SeedResult] = {}
    entries = []
    num_named = Counter(job.name for job in jobs)
    for job, epochs in _read(session, jobs, has_curves=has_curves):
        evidence = Evidence(job, epochs, thresholds, criteria_set)
        found = assess(evidence)
        entries.append(
            ComparedJob(
                job=job,
                verdict=describe_verdict(evidence, found),
                epochs=epochs if has_curves else epochs[-1:],
                has_namesake=num_named[job.name] > 1,
            )
        )
        results[job.id] = SeedResult.of_assessment(
            evidence, found if job.is_judged else None, seed=job.training_config.seed
        )
    others = {job.id: job for group in groups for job in group if job.id not in results}
    for job, epochs in read_in_parts(session, list(others.values())):
        results[job.id] = SeedResult.of(
            job,
            epochs,
            seed=job.training_config.seed,
            thresholds=thresholds,
            criteria_set=criteria_set,
        )
    arms, decision = judge_groups(groups, results=results, criteria_set=criteria_set)
    return Comparison(
        entries=entries,
        criteria_set=criteria_set,
        thresholds=thresholds,
        ranking=rank([JudgedJob(entry.job, entry.verdict, entry.epochs) for entry in entries]),
        differences=find_differences(jobs),
        groups=arms,
        decision=decision,
    )


def _read(
    session: Session, jobs: Sequence[Job], *, has_curves: bool
) -> Iterator[tuple[Job, Sequence[EpochSummary]]]:
    if not has_curves:
        return read_in_parts(session, jobs)
    histories = read_histories(session, [job.id for job in jobs], has_kl_curves=True)
    return ((job, histories[job.id]) for job in jobs)


def group_jobs(jobs: Sequence[Job]) -> list[list[Job]]:
    """The jobs of each configuration in the order of their seeds.

    Of jobs that are the same run, with the same seeds, the newest judged one stands for all.
    """
    groups: dict[str, dict[tuple[int, int], Job]] = {}
    for job in sorted(jobs, key=lambda job: (job.is_judged, job.created_at)):
        groups.setdefault(job.config_sha256, {})[job.training_config.seeds] = job
    return [[by_seed[seeds] for seeds in sorted(by_seed)] for by_seed in groups.values()]


def judge_groups(
    groups: Sequence[Sequence[Job]],
    *,
    results: Mapping[str, SeedResult],
    criteria_set: CriteriaSet,
) -> tuple[list[ArmVerdict], Recommendation]:
    """Each group's verdict, by the results of its jobs, and the decision at one look."""
    arms = _name_arms([group[0] for group in groups])
    by_arm = [[results[job.id] for job in group] for group in groups]
    verdicts = [judge_group(each, criteria_set=criteria_set) for each in by_arm]
    counts = {
        arm.name: ArmCount(verdict.num_passed, verdict.num_judged)
        for arm, verdict in zip(arms, verdicts, strict=True)
    }
    decision = decide(counts, num_looks=1)
    out = {entry.arm for entry in decision.ruled_out}
    described = [
        describe_arm(arm, verdict, results=each, is_out=arm.name in out)
        for arm, verdict, each in zip(arms, verdicts, by_arm, strict=True)
    ]
    return described, recommend(decision, counts, criteria_set=criteria_set)


def _name_arms(jobs: Sequence[Job]) -> list[Arm]:
    """An arm for the configuration of each job: its option, and if another one has the same
    option the settings in which they differ."""
    num_named = Counter(job.option for job in jobs)
    differences = find_differences(jobs)
    names = []
    for job in jobs:
        settings = [
            f"{key}={values[job.id]}"
            for key, values in differences.items()
            if key not in ("option", *NOT_IDENTITY)
        ]
        names.append(" ".join([job.option, *settings]) if num_named[job.option] > 1 else job.option)
    is_unique = len(set(names)) == len(names)
    return [
        Arm(
            # Data sets that were replaced under one name differ in nothing that is shown.
            name=name if is_unique else f"{name} ({job.config_sha256[:8]})",
            option=job.option,
            config=job.config,
            config_sha256=job.config_sha256,
        )
        for name, job in zip(names, jobs, strict=True)
    ]


def _say_more(decision: Recommendation) -> str:
    if decision.more_seeds is None:
        return "a study of several seeds can"
    return f"{decision.more_seeds} more seeds of each probably would"
