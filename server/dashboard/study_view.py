"""What the pages show of a study and its arms, in words and marks."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from markupsafe import Markup, escape

from server.api.study_schemas import StudyPublic
from server.dashboard.drawings import SEED_MARKS, draw_interval
from server.dashboard.rendering import format_words
from server.jobs.studies import MAX_SEEDS, is_racing
from server.judging.decisions import Recommendation, RuledOutArm
from server.judging.groups import GroupMetric
from server.judging.methods import list_varied
from server.judging.studies import ArmVerdict, SeedPublic
from server.models.studies import Study
from server.models.tables import JobStatus

#: The mark of a seed that is not judged, by the status of its job.
_OPEN_MARKS: Final = {
    JobStatus.queued: "waiting",
    JobStatus.running: "running",
    JobStatus.paused: "paused",
}
_LIVE: Final = tuple(_OPEN_MARKS)


@dataclass(frozen=True, slots=True)
class SeedMark:
    """A seed as a mark that leads to its job."""

    kind: str
    label: str
    job_id: str | None


@dataclass(frozen=True, slots=True)
class ArmRow:
    """An arm of the page's table."""

    arm: ArmVerdict
    ruled_out: RuledOutArm | None
    seeds: list[SeedMark]
    interval: Markup | None
    failures: list[tuple[str, int, int]]  # criterion, in how many seeds, of how many

    @property
    def median_iou(self) -> float | None:
        return self.arm.metrics[GroupMetric.val_foreground_iou].median

    @property
    def median_ap(self) -> float | None:
        return self.arm.metrics[GroupMetric.val_foreground_ap].median


@dataclass(frozen=True, slots=True)
class LookStep:
    """A planned look: `done`, `next` or `later`."""

    num_seeds: int
    state: str
    ruled_out: list[str]
    at: Any = None


def describe_arms(study: StudyPublic) -> list[ArmRow]:
    ruled_out = {entry.arm: entry for entry in study.recommendation.ruled_out}
    return [
        ArmRow(
            arm=arm,
            ruled_out=ruled_out.get(arm.arm),
            seeds=[_mark_seed(seed) for seed in arm.seeds],
            interval=_draw_interval(arm),
            failures=[
                (each.name, each.num_judged - each.num_passed, each.num_judged)
                for each in arm.criteria
                if each.num_passed < each.num_judged
            ],
        )
        for arm in study.arms
    ]


def describe_looks(study: StudyPublic) -> list[LookStep]:
    """The looks that took place, and those that are planned."""
    steps = [LookStep(look.num_seeds, "done", look.ruled_out, look.at) for look in study.looks]
    if study.next_look is None:
        return steps
    coming = [number for number in study.planned_looks if number >= study.next_look]
    return steps + [
        LookStep(number, "next" if number == study.next_look else "later", []) for number in coming
    ]


def list_kinds(rows: Sequence[ArmRow]) -> list[str]:
    """The kinds of marks on the page, for the legend: those of judged seeds first."""
    found = {seed.kind for row in rows for seed in row.seeds}
    return [kind for kind in SEED_MARKS if kind in found]


def list_actions(study: Study, public: StudyPublic) -> list[str]:
    """The actions that the study's state allows."""
    num_live = sum(public.num_by_status.get(status, 0) for status in _LIVE)
    is_live = num_live > 0 or is_racing(study)
    is_stopping = study.cancel_requested_at is not None and num_live > 0
    is_paused = study.pause_requested_at is not None and is_live
    can_resume = is_paused or any(_can_resume(seed) for arm in public.arms for seed in arm.seeds)
    allowed = {
        "pause": is_live and not is_stopping and not is_paused,
        "resume": can_resume and not is_stopping,
        "cancel": is_live and not is_stopping,
        "seeds": len(study.seeds) < MAX_SEEDS and not is_stopping,
        "delete": not is_live,
    }
    return [action for action, is_allowed in allowed.items() if is_allowed]


def write_sentence(recommendation: Recommendation, names: Sequence[str]) -> Markup:
    """The decision as a sentence. Names that run from right to left keep to themselves."""
    reason = recommendation.reason
    # A name keeps its letters: arm b is not arm B.
    if not any(reason.startswith(name) for name in recommendation.kept):
        reason = reason[:1].upper() + reason[1:]
    return isolate_names(f"{reason}.", names)


def isolate_names(text: str, names: Sequence[str]) -> Markup:
    """The text with each of these names that is not plain ASCII in an element of its own."""
    special = sorted((name for name in names if not name.isascii()), key=len, reverse=True)
    if not special:
        return escape(text)
    parts = re.split(f"({'|'.join(map(re.escape, special))})", text)
    return Markup("").join(
        Markup("<bdi>{}</bdi>").format(part) if place % 2 else escape(part)
        for place, part in enumerate(parts)
    )


def find_differences(arms: Sequence[ArmVerdict]) -> dict[str, list[Any]]:
    """The option and the settings in which arms differ, each with its value by arm."""
    options = [arm.option for arm in arms]
    rows: dict[str, list[Any]] = {"option": options} if len(set(options)) > 1 else {}
    return rows | {key: [arm.config.get(key) for arm in arms] for key in list_varied(arms)}


def _draw_interval(arm: ArmVerdict) -> Markup | None:
    if arm.pass_rate is None or arm.pass_rate_interval is None:
        return None
    return draw_interval(arm.pass_rate, *arm.pass_rate_interval, name=arm.arm)


def _mark_seed(seed: SeedPublic) -> SeedMark:
    kind, words = _describe_seed(seed)
    reused = ", trained before" * seed.is_reused
    return SeedMark(kind, f"seed {seed.seed}: {words}{reused}", seed.job_id)


def _describe_seed(seed: SeedPublic) -> tuple[str, str]:
    """The mark, and what it means."""
    if seed.diagnosis is not None:
        outcome = {True: "passed", False: "failed", None: "undecided"}[seed.has_passed]
        return seed.diagnosis, f"{format_words(seed.diagnosis)}, {outcome}"
    if seed.status in _OPEN_MARKS:
        return _OPEN_MARKS[seed.status], _OPEN_MARKS[seed.status]
    return "missing", f"missing, its job {_explain_loss(seed)}"


def _explain_loss(seed: SeedPublic) -> str:
    if seed.status is None:
        return "was deleted"
    return "was cancelled" if seed.status == JobStatus.cancelled else "failed"


def _can_resume(seed: SeedPublic) -> bool:
    """Whether the seed's job stopped before it was judged."""
    stopped = (JobStatus.paused, JobStatus.cancelled, JobStatus.failed)
    return seed.has_passed is None and seed.status in stopped and not seed.is_reused
