"""Comparisons: verdicts of several jobs, their ranking, and the settings that differ."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlmodel import Session

from server.judging.criteria import Criterion, CriterionName, Thresholds
from server.judging.histories import History, read_histories
from server.judging.ranking import Ranking, find_differences, rank
from server.judging.verdicts import Verdict, judge
from server.models.tables import Job

MAX_COMPARED_JOBS: Final = 100
#: Baselines in the curves; jobs on more than three different data sets are rare.
_MAX_BACKGROUND_SHARES: Final = 3


@dataclass(frozen=True, slots=True)
class ComparedJob:
    """A job of a comparison with its verdict and epochs."""

    job: Job
    verdict: Verdict
    epochs: History
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


@dataclass(frozen=True, slots=True)
class Comparison:
    """Jobs with verdicts, their ranking and recommendation, and the settings that differ."""

    entries: list[ComparedJob]
    thresholds: Thresholds
    ranking: Ranking
    differences: dict[str, dict[str, Any]]

    @property
    def jobs(self) -> list[Job]:
        return [entry.job for entry in self.entries]

    @property
    def background_shares(self) -> list[float]:
        """The pixel accuracy of an all-background output on each of the jobs' data sets."""
        summaries = [job.dataset_summary for job in self.jobs if job.dataset_summary]
        shares = {round(summary["background_share"], 4) for summary in summaries}
        return sorted(shares)[:_MAX_BACKGROUND_SHARES]

    def by_criterion(self) -> list[tuple[CriterionName, list[Criterion]]]:
        """Each criterion's name with its result for every job."""
        columns = [entry.verdict.criteria for entry in self.entries]
        return [(row[0].name, list(row)) for row in zip(*columns, strict=True)]


def compare(session: Session, jobs: Sequence[Job], *, thresholds: Thresholds) -> Comparison:
    """Judge jobs side by side."""
    histories = read_histories(session, [job.id for job in jobs])
    num_named = Counter(job.name for job in jobs)
    entries = [
        ComparedJob(
            job=job,
            verdict=judge(job, histories[job.id], thresholds),
            epochs=histories[job.id],
            has_namesake=num_named[job.name] > 1,
        )
        for job in jobs
    ]
    ranking = rank([(entry.job, entry.verdict) for entry in entries])
    return Comparison(entries, thresholds, ranking, find_differences(jobs))
