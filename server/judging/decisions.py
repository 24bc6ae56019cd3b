"""Decisions in words: what the counts of a look allow to say, for studies and comparisons."""

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from pydantic import BaseModel, Field

from server.judging.criteria import CriteriaSet
from server.judging.statistics import PLANNED_LOOKS, Decision, DecisionState, RuledOut

#: The largest chance that the best arm is ruled out, over all planned looks.
ERROR: Final = 0.05
_MAX_ARMS_NAMED: Final = 6
#: What one arm does that passes mostly, and what several do.
_VERBS: Final = {
    CriteriaSet.spec: ("escapes collapse", "escape collapse"),
    CriteriaSet.evidence: ("passes by evidence", "pass by evidence"),
}


class ArmCount(NamedTuple):
    num_passed: int
    num_judged: int


class RuledOutArm(BaseModel):
    """An arm that passes less often than another, by Boschloo's exact test."""

    arm: str
    by: str
    p_value: float
    num_seeds: int


class Recommendation(BaseModel):
    """What may be said about the arms, and with what error."""

    state: DecisionState
    arm: str | None = Field(description="the recommended arm; null unless decided")
    option: str | None
    job_id: str | None = Field(description="the recommended arm's median run")
    kept: list[str]
    ruled_out: list[RuledOutArm]
    error: float = Field(
        description="the largest chance that the best arm is ruled out, over the planned looks"
    )
    reason: str
    more_seeds: int | None = Field(
        description="further seeds of each kept arm that will probably decide; null if no planned "
        "number of seeds would"
    )


def recommend(
    decision: Decision,
    counts: Mapping[str, ArmCount],
    *,
    option: str | None = None,
    job_id: str | None = None,
    next_look: int | None = None,
    has_looked: bool = True,
    has_late_looks: bool = False,
    is_cut_short: bool = False,
    criteria_set: CriteriaSet = CriteriaSet.spec,
) -> Recommendation:
    """The decision with a sentence for people; `counts` are those of the last look."""
    if has_looked:
        reason = _explain(decision, counts, criteria_set=criteria_set)
    else:
        reason = _announce(next_look, num_arms=len(counts))
    bound = f"the error of {ERROR:.0%} holds for the looks that were planned"
    if has_late_looks:
        reason += f". Seeds were added later: {bound}"
    elif is_cut_short:
        reason += f". It was cancelled before this look was due: {bound}"
    return Recommendation(
        state=decision.state,
        arm=decision.arm,
        option=option,
        job_id=job_id,
        kept=decision.kept,
        ruled_out=[
            RuledOutArm(
                arm=entry.arm, by=entry.by, p_value=entry.p_value, num_seeds=entry.num_seeds
            )
            for entry in decision.ruled_out
        ],
        error=ERROR,
        reason=reason,
        more_seeds=decision.more_seeds,
    )


def join_names(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`; of many only the first."""
    if len(names) > _MAX_ARMS_NAMED:
        shown = names[: _MAX_ARMS_NAMED - 1]
        return f"{', '.join(shown)} and {len(names) - len(shown)} others"
    return " and ".join([*([", ".join(names[:-1])] if names[:-1] else []), *names[-1:]])


def _explain(
    decision: Decision, counts: Mapping[str, ArmCount], *, criteria_set: CriteriaSet
) -> str:
    shown = _list_counts(decision.kept, counts)
    match decision.state:
        case DecisionState.no_data:
            return "nothing was judged"
        case DecisionState.none:
            return f"no arm passed once: {shown}"
        case DecisionState.decided:
            kept = _describe_kept(decision, counts, verbs=_VERBS[criteria_set])
            return kept + _describe_ruled_out(decision.ruled_out)
        case DecisionState.narrowed:
            return (
                _describe_kept(decision, counts, verbs=_VERBS[criteria_set])
                + _describe_ruled_out(decision.ruled_out)
                + _explain_rest(decision, counts)
            )
        case DecisionState.undecided:
            return f"nothing is decided: {shown}" + _explain_rest(decision, counts)


def _announce(next_look: int | None, *, num_arms: int) -> str:
    """Before the first look nothing is said, whatever was judged so far."""
    if next_look is None:
        return "nothing was decided: no look took place"
    of_each = " of each arm" if num_arms > 1 else ""
    plural = "s" if next_look > 1 else ""
    return f"nothing is decided yet: the first look is at {next_look} seed{plural}{of_each}"


def _describe_kept(
    decision: Decision, counts: Mapping[str, ArmCount], *, verbs: tuple[str, str]
) -> str:
    """`b and d escape collapse, 9 and 10 of 10`, or the counts if not all of them do."""
    kept = decision.kept
    shown, numbers = _list_counts(kept, counts), {counts[arm].num_judged for arm in kept}
    is_one = len(kept) == 1
    if not all(_passes_mostly(counts[arm]) for arm in kept):
        return f"{join_names(kept)} {'is' if is_one else 'are'} left: {shown}"
    verb = verbs[0] if is_one else verbs[1]
    if len(numbers) == 1 and len(kept) <= _MAX_ARMS_NAMED:
        passed = join_names([str(counts[arm].num_passed) for arm in kept])
        return f"{join_names(kept)} {verb}, {passed} of {numbers.pop()}"
    return f"{join_names(kept)} {verb}: {shown}"


def _passes_mostly(count: ArmCount) -> bool:
    return 2 * count.num_passed > count.num_judged


def _list_counts(arms: Sequence[str], counts: Mapping[str, ArmCount]) -> str:
    return join_names(
        [f"{arm} passed {counts[arm].num_passed} of {counts[arm].num_judged}" for arm in arms]
    )


def _describe_ruled_out(ruled_out: Sequence[RuledOut]) -> str:
    if not ruled_out:
        return ""
    names = join_names([entry.arm for entry in ruled_out])
    highest = format_p_value(max(entry.p_value for entry in ruled_out))
    if len(ruled_out) == 1:
        return f"; {names} is ruled out, {highest}"
    return f"; {names} are ruled out, {highest.replace('=', '≤')}"


def format_p_value(p_value: float) -> str:
    """`p < 0.001` or `p = 0.016`."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"


def _explain_rest(decision: Decision, counts: Mapping[str, ArmCount]) -> str:
    """What more seeds would bring."""
    more = decision.more_seeds
    if len(decision.kept) == 1:
        low = "its pass rate may still be below one half"
        if more is None:
            return f"; {low}, so it is not recommended"
        num_judged = counts[decision.kept[0]].num_judged
        return f"; after {_count_seeds(num_judged)} {low}; {more} more would probably settle it"
    if unknown := [arm for arm in decision.kept if not counts[arm].num_judged]:
        return f"; no seed of {join_names(unknown)} was judged"
    apart = "the two" if len(decision.kept) == 2 else f"the {len(decision.kept)}"
    if more is not None:
        seeds = _count_seeds(more, word="more seed")
        return f"; telling {apart} apart would probably take {seeds} of each"
    num_judged = max(counts[arm].num_judged for arm in decision.kept)
    if num_judged < PLANNED_LOOKS[-1]:
        return f"; at these rates {PLANNED_LOOKS[-1]} seeds would hardly tell {apart} apart"
    return f"; {_count_seeds(num_judged)} of each do not tell {apart} apart"


def _count_seeds(number: int, *, word: str = "seed") -> str:
    return f"{number} {word}{'s' if number != 1 else ''}"
