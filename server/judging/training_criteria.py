"""Criteria of how the training went, which belong to every set.

Losses of different epochs are compared after re-weighting them to the final β: while β warms up,
the loss as trained is expected to rise. In the first epoch β is near 0 and the KL high, so that its
re-weighted loss is far above that of the next one, whatever happens. `loss_decreases` therefore
asks the same of the reconstruction loss alone.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

from server.judging.criteria import (
    CriteriaSet,
    CriterionName,
    Diagnosis,
    Evidence,
    Finding,
    compute_rise,
    criterion,
    is_at_most,
    rises_at_most,
)
from server.judging.histories import History

#: The first epoch whose change to the next one counts as a jump. The accuracy and the loss of epoch
#: 1 are means over the time in which the model learns most and β warms up: in a training of five
#: epochs, over the whole warm-up. In a longer one β still rises in later epochs, but by a small
#: share in each, and the loss is re-weighted: of 50 epochs those after the first changed the
#: accuracy of option b by at most 0.04, while the third changed that of c by 0.18.
_FIRST_COUNTED: Final = 2


@criterion(CriterionName.loss_decreases, *CriteriaSet)
def judge_loss(evidence: Evidence) -> Finding:
    """Training's reconstruction loss, and its loss at the final β, are finite and fall from each
    epoch to the next."""
    epochs, tolerance = evidence.epochs, evidence.limits.loss_tolerance
    target = (
        "reconstruction loss and loss at the final β of each epoch below those of the one before, "
        f"within {tolerance:.0%}"
    )
    curves = {
        "reconstruction loss": [row.train_recon_loss for row in epochs],
        "loss, re-weighted to the final β,": reweigh(epochs),
    }
    broken = {
        name: _find_broken(epochs, losses, tolerance=tolerance) for name, losses in curves.items()
    }
    at_fault = _merge(*broken.values(), lost_epoch=evidence.lost_epoch)
    if len(epochs) < 2 and not at_fault:
        return _lack_change(evidence, target=target)
    rises = [rise for losses in curves.values() for rise in _compute_rises(losses)]
    return Finding(
        target=target,
        diagnosis=Diagnosis.unstable,
        has_passed=not at_fault,
        value=max(rises, default=math.nan),
        epochs=at_fault or [row.epoch for row in epochs],
        explanation=_describe_course(rises, broken, lost_epoch=evidence.lost_epoch),
    )


def _lack_change(evidence: Evidence, *, target: str) -> Finding:
    if not evidence.epochs:
        return Finding(target=target)
    return Finding(
        target=target,
        explanation="one epoch shows no change",
        is_not_applicable=evidence.job.status.is_terminal,
    )


def _find_broken(epochs: History, losses: Sequence[float], *, tolerance: float) -> set[int]:
    """The epochs whose loss is not finite, or above the one before."""
    not_finite = {
        row.epoch for row, loss in zip(epochs, losses, strict=True) if not math.isfinite(loss)
    }
    risen = {
        row.epoch
        for row, (before, loss) in zip(epochs[1:], pairwise(losses), strict=True)
        if math.isfinite(before) and not rises_at_most(before, loss, share=tolerance)
    }
    return not_finite | risen


def _describe_course(
    rises: Sequence[float], broken: Mapping[str, set[int]], *, lost_epoch: int | None
) -> str:
    texts = [f"the {name} rises in epochs {sorted(each)}" for name, each in broken.items() if each]
    texts += _describe_lost(lost_epoch)
    if texts:
        return "; ".join(texts)
    highest = max(rises)
    rise = f", or rise by {highest:.2%} at most" * (highest > 0)
    return f"the reconstruction loss and the loss at the final β fall from epoch to epoch{rise}"


class _Point(NamedTuple):
    """What `stable` looks at in an epoch."""

    epoch: int
    accuracy: float
    loss: float  # re-weighted to the final β

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.accuracy) and math.isfinite(self.loss)


@criterion(CriterionName.stable, *CriteriaSet)
def judge_stability(evidence: Evidence) -> Finding:
    """After the first epoch, accuracy and loss do not jump between epochs, and the last epoch has
    no step whose loss jumps."""
    epochs, limits = evidence.epochs, evidence.limits
    target = (
        f"after the first epoch, accuracy changes of at most {limits.max_accuracy_change:.2f} and "
        f"loss rises of at most {limits.max_loss_rise:.0%} between epochs, and no step of the last "
        f"one above {limits.max_spike_ratio:g}x the running median"
    )
    points = [
        _Point(row.epoch, row.train_pixel_accuracy, loss)
        for row, loss in zip(epochs, reweigh(epochs), strict=True)
    ]
    pairs = [pair for pair in pairwise(points) if pair[0].epoch >= _FIRST_COUNTED]
    spike = epochs[-1].max_spike_ratio if len(epochs) > 1 else None
    at_fault = _merge(
        {point.epoch for point in points if not point.is_finite},
        {after.epoch for before, after in pairs if not _is_even(before, after, evidence=evidence)},
        lost_epoch=evidence.lost_epoch,
    )
    if len(epochs) < 2 and not at_fault:
        return _lack_change(evidence, target=target)
    has_spike = spike is not None and not is_at_most(spike, limits.max_spike_ratio)
    return Finding(
        target=target,
        diagnosis=Diagnosis.unstable,
        has_passed=not at_fault and not has_spike,
        value=max((_change(*pair) for pair in pairs), default=math.nan),
        epochs=at_fault or [row.epoch for row in epochs],
        explanation=_describe_jumps(pairs, spike=spike, lost_epoch=evidence.lost_epoch),
    )


def _is_even(before: _Point, after: _Point, *, evidence: Evidence) -> bool:
    limits = evidence.limits
    return is_at_most(_change(before, after), limits.max_accuracy_change) and rises_at_most(
        before.loss, after.loss, share=limits.max_loss_rise
    )


def _change(before: _Point, after: _Point) -> float:
    return abs(after.accuracy - before.accuracy)


def _describe_jumps(
    pairs: Sequence[tuple[_Point, _Point]], *, spike: float | None, lost_epoch: int | None
) -> str:
    texts = [] if pairs else ["the change to the second epoch is not counted"]
    if pairs:
        rise = max(compute_rise(before.loss, after.loss) for before, after in pairs)
        texts += [
            f"largest accuracy change {max(_change(*pair) for pair in pairs):.3f}",
            f"largest loss rise {max(rise, 0.0):.1%}",
        ]
    last = "too few steps for spikes" if spike is None else f"largest spike {spike:.2f}x"
    texts += [f"{last} in the last epoch", *_describe_lost(lost_epoch)]
    return ", ".join(texts)


@criterion(CriterionName.completed, *CriteriaSet)
def judge_completion(evidence: Evidence) -> Finding:
    """All planned epochs ran."""
    planned = evidence.config.epochs
    done = evidence.final.epoch if evidence.final else 0
    target = f"all {planned} planned epochs"
    if not evidence.job.status.is_terminal and done < planned:
        return Finding(target=target, explanation=f"{done} so far")
    return Finding(
        target=target,
        diagnosis=Diagnosis.unfinished,
        has_passed=done >= planned,
        value=done,
        epochs=[done] if done else [],
        explanation=f"{done} of {planned} epochs ran",
    )


def has_diverged(evidence: Evidence) -> bool:
    """Whether the loss stopped being a number, or the last epoch's is above the first one's."""
    losses = reweigh(evidence.epochs)
    if evidence.lost_epoch is not None:
        return True
    share = evidence.limits.loss_tolerance
    return bool(losses) and not rises_at_most(losses[0], losses[-1], share=share)


def reweigh(epochs: History) -> list[float]:
    """Each epoch's training loss, computed with the last epoch's β."""
    beta = epochs[-1].beta if epochs else 0.0
    return [row.train_recon_loss + beta * row.train_kl_loss for row in epochs]


def _compute_rises(losses: Sequence[float]) -> list[float]:
    """The relative rise from each epoch to the next; falls are negative."""
    return [compute_rise(before, loss) for before, loss in pairwise(losses)]


def _merge(*epochs: set[int], lost_epoch: int | None) -> list[int]:
    lost = set() if lost_epoch is None else {lost_epoch}
    return sorted(lost.union(*epochs))


def _describe_lost(lost_epoch: int | None) -> list[str]:
    if lost_epoch is None:
        return []
    return [f"the loss of epoch {lost_epoch}, which was not recorded, is no finite number"]
