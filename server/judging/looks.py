"""The planned looks of a study: which took place, what each saw, and which comes next."""

from collections.abc import Mapping, Sequence
from datetime import datetime

from pydantic import BaseModel, Field

from server.judging.decisions import ERROR, ArmCount
from server.judging.groups import SeedResult
from server.judging.statistics import DecisionState, SequentialDecision, decide_in_looks
from server.models.studies import Study
from server.models.tables import JobStatus

#: An arm's judged seeds in order. None stands for a seed that a round did not have.
Known = Sequence[SeedResult | None]


class LookPublic(BaseModel):
    """A look that took place: every arm that was still in, by its first seeds."""

    num_seeds: int
    at: datetime | None = Field(description="when the last job that it needed ended")
    ruled_out: list[str]


class Looks:
    """The looks at a study. A look waits until each arm that is still in has so many judged seeds,
    or no other to come; what it saw does not change when further seeds are queued."""

    def __init__(self, study: Study, results: Mapping[str, Sequence[SeedResult]]) -> None:
        self._study = study
        rounds = study.rounds or [len(study.seeds)]
        self._known = {arm: list_known(each, rounds=rounds) for arm, each in results.items()}
        self._results = results
        self._has_ended = all(result.has_ended for each in results.values() for result in each)
        self._num_due = 0  # planned looks whose seeds have ended
        self._is_stuck = False  # the last of them had nothing new to see
        self.sequential = self._take()

    @property
    def num_seeds(self) -> int:
        """Of the last look; 0 before the first."""
        return self.sequential.looks[-1].num_seeds if self.sequential.looks else 0

    def find_next(self) -> int | None:
        """The number of seeds of the next look; None if no look is left.

        A race ends when the jobs of a whole round are lost: those of the next one would be, too.
        """
        study, coming = self._study, self._study.looks[self._num_due :]
        is_cancelled = study.cancel_requested_at is not None
        if not coming or is_cancelled or self._is_race_decided():
            return None
        is_race_over = study.decided_at is not None or (self._is_stuck and self._has_ended)
        is_at_end = is_race_over if study.until_decided else self._has_ended
        return None if is_at_end else coming[0]

    def list_coming(self) -> list[int]:
        """The numbers of seeds of all looks that are left; those of a race may not be needed."""
        return [] if self.find_next() is None else self._study.looks[self._num_due :]

    @property
    def late(self) -> list[int]:
        """The looks that took place and were planned after others had."""
        planned = self._study.looks[: self._study.num_planned_looks]
        return [look.num_seeds for look in self.sequential.looks if look.num_seeds not in planned]

    @property
    def is_cut_short(self) -> bool:
        """Whether the last look took place because somebody cancelled what it was to wait for."""
        return self._study.cancel_requested_at is not None and any(
            result.status == JobStatus.cancelled and result.position < self.num_seeds
            for results in self._results.values()
            for result in results
        )

    def count(self) -> dict[str, ArmCount]:
        """What the last look saw of each arm."""
        return {
            arm: ArmCount(sum(result.has_passed for result in used), len(used))
            for arm, used in self._use(self._known, num_seeds=self.num_seeds).items()
        }

    def describe(self) -> list[LookPublic]:
        """Each look that took place, oldest first."""
        running, looks = dict(self._known), list[LookPublic]()
        for look in self.sequential.looks:
            used = self._use(running, num_seeds=look.num_seeds)
            ends = [r.ended_at for each in used.values() for r in each if r.ended_at is not None]
            ruled_out = [entry.arm for entry in look.ruled_out]
            looks.append(
                LookPublic(num_seeds=look.num_seeds, at=max(ends, default=None),
                           ruled_out=ruled_out)
            )  # fmt: skip
            running = {arm: each for arm, each in running.items() if arm not in ruled_out}
        return looks

    def _is_race_decided(self) -> bool:
        """Whether a race has found the arm that can be recommended, by all seeds that it has."""
        is_decided = self.sequential.decision.state == DecisionState.decided
        has_seen_all = len(self._study.seeds) <= self.num_seeds
        return self._study.until_decided and is_decided and has_seen_all

    def _take(self) -> SequentialDecision:
        taken, before = list[int](), 0
        sequential = self._decide(taken)
        for num_seeds in self._study.looks:
            known = [self._known[arm] for arm in sequential.decision.kept]
            if not all(len(each) >= num_seeds for each in known):
                break
            self._num_due += 1
            self._is_stuck = not any(any(each[before:num_seeds]) for each in known)
            if not self._is_stuck:
                taken.append(num_seeds)
                sequential = self._decide(taken)
            before = num_seeds
        # Seeds that were asked for after a lost round are new to the next look.
        kept = sequential.decision.kept
        self._is_stuck &= not any(any(self._known[arm][before:]) for arm in kept)
        return sequential

    def _decide(self, looks: Sequence[int]) -> SequentialDecision:
        return decide_in_looks(
            {
                arm: [None if result is None else result.has_passed for result in each]
                for arm, each in self._known.items()
            },
            looks=looks,
            num_planned_looks=self._study.num_planned_looks,
            error=ERROR,
        )

    def _use(self, known: Mapping[str, Known], *, num_seeds: int) -> dict[str, list[SeedResult]]:
        return {
            arm: [result for result in each[:num_seeds] if result is not None]
            for arm, each in known.items()
        }


def list_known(results: Sequence[SeedResult], *, rounds: Sequence[int]) -> list[SeedResult | None]:
    """An arm's judged seeds up to the first whose job has not ended.

    A round that has ended is filled up with None in place of its missing seeds, so that those of
    a later round do not slip into a look that took place before it.
    """
    known: list[SeedResult | None] = []
    begin = 0
    for end in rounds:
        of_round = [result for result in results if begin <= result.position < end]
        for result in of_round:
            if not result.has_ended:
                return known
            if result.is_judged:
                known.append(result)
        if not of_round:
            return known  # the arm was ruled out before
        known += [None] * (end - len(known))
        begin = end
    return known
