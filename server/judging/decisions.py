"""Decisions in words: what the counts of a look allow to say, for studies and comparisons."""

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from pydantic import BaseModel, Field

from server.judging.statistics import Decision, DecisionState, RuledOut

#: The largest chance that the best arm is ruled out, over all planned looks.
ERROR: Final = 0.05
_MAX_ARMS_NAMED: Final = 6


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
    has_late_looks: bool = False,
) -> Recommendation:
    """The decision with a sentence for people; `counts` are those of the last look."""
    reason = _explain(decision, counts, next_look=next_look)
    if has_late_looks:
        reason += (
            f". Seeds were added later: the error of {ERROR:.0%} holds for the looks that were "
            "planned"
        )
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


def _explain(decision: Decision, counts: Mapping[str, ArmCount], *, next_look: int | None) -> str:
    match decision.state:
        case DecisionState.no_data:
            return _explain_no_data(counts, next_look=next_look)
        case DecisionState.none:
            return f"no arm passed once: {_list_counts(decision.kept, counts)}"
        case DecisionState.decided:
            return _describe_kept(decision, counts) + _describe_ruled_out(decision.ruled_out)
        case DecisionState.narrowed:
            return (
                _describe_kept(decision, counts)
                + _describe_ruled_out(decision.ruled_out)
                + _explain_rest(decision, counts)
            )
        case DecisionState.undecided:
            return f"nothing is decided: {_list_counts(decision.kept, counts)}" + _explain_rest(
                decision, counts
            )


def _explain_no_data(counts: Mapping[str, ArmCount], *, next_look: int | None) -> str:
    if next_look is None:
        return "nothing was judged"
    of_each = " of each arm" if len(counts) > 1 else ""
    plural = "s" if next_look > 1 else ""
    return f"nothing is judged yet: the first look is at {next_look} seed{plural}{of_each}"


def _describe_kept(decision: Decision, counts: Mapping[str, ArmCount]) -> str:
    """`b and d escape collapse, 9 and 10 of 10`, or the counts if not all of them do."""
    kept = decision.kept
    numbers = {counts[arm].num_judged for arm in kept}
    if any(2 * counts[arm].num_passed < counts[arm].num_judged for arm in kept):
        verb = "is" if len(kept) == 1 else "are"
        return f"{join_names(kept)} {verb} left: {_list_counts(kept, counts)}"
    verb = "escapes" if len(kept) == 1 else "escape"
    if len(numbers) == 1 and len(kept) <= _MAX_ARMS_NAMED:
        passed = join_names([str(counts[arm].num_passed) for arm in kept])
        return f"{join_names(kept)} {verb} collapse, {passed} of {numbers.pop()}"
    return f"{join_names(kept)} {verb} collapse: {_list_counts(kept, counts)}"


def _list_counts(arms: Sequence[str], counts: Mapping[str, ArmCount]) -> str:
    return join_names(
        [f"{arm} passed {counts[arm].num_passed} of {counts[arm].num_judged}" for arm in arms]
    )


def _describe_ruled_out(ruled_out: Sequence[RuledOut]) -> str:
    if not ruled_out:
        return ""
    verb = "is" if len(ruled_out) == 1 else "are"
    highest = max(entry.p_value for entry in ruled_out)
    names = join_names([entry.arm for entry in ruled_out])
    return f"; {names} {verb} ruled out, {format_p_value(highest)}"


def format_p_value(p_value: float) -> str:
    """`p < 0.001` or `p = 0.016`."""
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.2g}"


def _explain_rest(decision: Decision, counts: Mapping[str, ArmCount]) -> str:
    """What more seeds would bring."""
    more = decision.more_seeds
    if len(decision.kept) == 1:
        count = counts[decision.kept[0]]
        low = "its pass rate may still be below one half"
        if more is None:
            return f"; {low}, so it is not recommended"
        return f"; after {count.num_judged} seeds {low}; {more} more would probably settle it"
    if len(decision.kept) == 2:
        task = "telling the two apart"
    else:
        task = f"telling the {len(decision.kept)} apart"
    if more is None:
        return f"; {task} would take more than 40 seeds"
    return f"; {task} would probably take {more} more seeds of each"
