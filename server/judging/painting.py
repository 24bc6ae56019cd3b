"""What argmax paints of the validation split in the final epoch, and what failing at it means."""

from dataclasses import dataclass
from typing import Self

from server.judging.criteria import (
    Diagnosis,
    Evidence,
    Thresholds,
    is_above,
    is_at_least,
    is_below,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Painting:
    """Shares are of all cells. None is what is not known, or what there is no case of."""

    epoch: int
    recall: float | None  # of foreground cells, with exactly their colour
    precision: float | None  # of painted cells, with exactly their colour
    all_black_share: float  # of the reconstructions
    painted_share: float
    foreground_share: float | None  # what there is to paint

    @classmethod
    def of(cls, evidence: Evidence) -> Self | None:
        """None without an epoch."""
        final = evidence.final
        if final is None:
            return None
        return cls(
            epoch=final.epoch,
            recall=final.val_foreground_recall,
            precision=final.val_foreground_precision,
            all_black_share=final.val_all_black_share,
            painted_share=1 - final.val_background_share,
            foreground_share=_find_foreground_share(evidence),
        )

    @property
    def ratio(self) -> float | None:
        """The painted share over the true one."""
        return self.painted_share / self.foreground_share if self.foreground_share else None

    def finds_objects(self, limits: Thresholds) -> bool:
        return self.recall is not None and is_at_least(self.recall, limits.min_foreground_recall)

    def is_mostly_black(self, limits: Thresholds) -> bool:
        return not is_below(self.all_black_share, limits.max_all_black_share)

    def has_collapsed(self, limits: Thresholds) -> bool:
        """What `not_mode_collapsed` asks, whichever criteria judge."""
        if self.recall is None:
            return False
        return not self.finds_objects(limits) or self.is_mostly_black(limits)

    def is_over_painted(self, limits: Thresholds) -> bool:
        """Objects are found, and far more cells are painted than there are to paint."""
        is_too_much = self.ratio is not None and is_above(self.ratio, limits.max_painted_ratio)
        return self.finds_objects(limits) and is_too_much

    def diagnose(self, evidence: Evidence) -> Diagnosis:
        """What happened to a model that paints wrongly."""
        limits = evidence.limits
        if self.has_collapsed(limits):
            return self._diagnose_collapse(evidence)
        return Diagnosis.over_painted if self.is_over_painted(limits) else Diagnosis.out_of_range

    def _diagnose_collapse(self, evidence: Evidence) -> Diagnosis:
        """The kind of a mode collapse. It is not known of jobs that are older than the measures,
        and none of the kinds if much is painted, but in wrong colours or places."""
        limits = evidence.limits
        if evidence.says_nothing:
            return Diagnosis.posterior_collapse
        is_known = evidence.final is not None and evidence.final.val_mutual_information is not None
        if is_known and (self.is_mostly_black(limits) or self._paints_too_little(limits)):
            return Diagnosis.decision_collapse
        return Diagnosis.mode_collapse

    def _paints_too_little(self, limits: Thresholds) -> bool:
        return self.ratio is not None and is_below(self.ratio, 1 / limits.max_painted_ratio)


def _find_foreground_share(evidence: Evidence) -> float | None:
    """Of the validation split; of jobs that are older than the measure, of the training split."""
    final, summary = evidence.final, evidence.job.dataset_summary or {}
    if final is not None and final.val_foreground_share is not None:
        return final.val_foreground_share
    background = summary.get("background_share")
    return None if background is None else 1 - background
