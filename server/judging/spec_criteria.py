"""Criteria that were asked for: by what argmax paints, and by the KL of the latent dimensions."""

from server.judging.criteria import (
    NO_FOREGROUND,
    CriteriaSet,
    CriterionName,
    Diagnosis,
    Evidence,
    Finding,
    criterion,
    is_above,
    is_at_least,
    is_at_most,
)
from server.judging.painting import Painting


@criterion(CriterionName.accuracy_in_range, CriteriaSet.spec)
def judge_accuracy(evidence: Evidence) -> Finding:
    """The final training pixel accuracy is between the two thresholds."""
    limits = evidence.limits
    target = f"{limits.min_accuracy:.2f} to {limits.max_accuracy:.2f}"
    final, painting = evidence.final, Painting.of(evidence)
    if final is None or painting is None:
        return Finding(target=target)
    accuracy = final.train_pixel_accuracy
    is_high_enough = is_at_least(accuracy, limits.min_accuracy)
    is_over_painted = not is_high_enough and painting.is_over_painted(limits)
    return Finding(
        target=target,
        diagnosis=Diagnosis.over_painted if is_over_painted else Diagnosis.out_of_range,
        has_passed=is_high_enough and is_at_most(accuracy, limits.max_accuracy),
        value=accuracy,
        epochs=[final.epoch],
        explanation=f"final training pixel accuracy {accuracy:.1%}",
    )


@criterion(CriterionName.not_mode_collapsed, CriteriaSet.spec)
def judge_mode_collapse(evidence: Evidence) -> Finding:
    """In the final epoch the foreground recall is high enough and few validation reconstructions
    are all black."""
    limits, target = evidence.limits, _describe_collapse_target(evidence)
    painting = Painting.of(evidence)
    if painting is None:
        return Finding(target=target)
    if painting.recall is None:
        return Finding(target=target, explanation=NO_FOREGROUND, is_not_applicable=True)
    return Finding(
        target=target,
        diagnosis=painting.diagnose(evidence),
        has_passed=not painting.has_collapsed(limits),
        value=painting.recall,
        epochs=[painting.epoch],
        explanation=f"validation foreground recall {painting.recall:.2f}, "
        f"{painting.all_black_share:.1%} of the reconstructions all black",
    )


def _describe_collapse_target(evidence: Evidence) -> str:
    limits, summary = evidence.limits, evidence.job.dataset_summary
    target = (
        f"foreground recall at least {limits.min_foreground_recall:.2f} and fewer than "
        f"{limits.max_all_black_share:.0%} of reconstructions all black"
    )
    share = (summary or {}).get("background_share")
    if share is not None:
        target += f"; an all-background output would be {share:.1%} accurate"
    return target


@criterion(CriterionName.kl_per_dimension, CriteriaSet.spec)
def judge_kl(evidence: Evidence) -> Finding:
    """In the final epoch, no latent dimension has a KL near 0."""
    limits = evidence.limits
    target = f"every dimension above {limits.min_kl_per_dimension:g} nats"
    final = evidence.final
    # Another version may have stored lists that cannot be read, which are empty.
    if final is None or not final.val_kl_per_dimension:
        return Finding(target=target)
    kl = final.val_kl_per_dimension
    num_active = sum(is_above(value, limits.min_kl_per_dimension) for value in kl)
    return Finding(
        target=target,
        # One weak dimension of ten does not mean that the latent says nothing.
        diagnosis=Diagnosis.under_informed,
        has_passed=num_active == len(kl),
        value=min(kl),
        epochs=[final.epoch],
        explanation=f"{num_active} of {len(kl)} dimensions active, the weakest at "
        f"{min(kl):.3f} nats",
    )
