"""Criteria of what the model knows, wherever argmax draws the line, all of the final epoch.

An average precision is compared with that of random scores, which is the share of the positive
cells (the prevalence). Sources: Hoffman and Johnson (2016) for the mutual information, Burda et al.
(2016) for active units.
"""

from server.judging.criteria import (
    NO_FOREGROUND,
    CriteriaSet,
    CriterionName,
    Diagnosis,
    Evidence,
    Finding,
    compute_rise,
    criterion,
    is_at_least,
    is_at_most,
    rises_at_most,
)
from server.judging.painting import Painting

_TOO_OLD = "the job is older than this measure"
_NOT_FINITE = "the measure has no finite value"


@criterion(CriterionName.informative, CriteriaSet.evidence)
def judge_information(evidence: Evidence) -> Finding:
    """The latent says enough about the grid, by enough of its dimensions."""
    limits = evidence.limits
    target = (
        f"mutual information of grid and latent at least {limits.min_mutual_information:g} nats, "
        f"and at most {limits.max_inactive_units} dimensions inactive by their variance"
    )
    final = evidence.final
    if final is None:
        return Finding(target=target)
    information, num_active = final.val_mutual_information, final.val_active_units_variance
    if information is None or num_active is None:
        return _lack_data(evidence, target=target, reason=_NOT_FINITE)
    num_dimensions = len(final.val_kl_per_dimension)
    is_enough = is_at_least(information, limits.min_mutual_information)
    return Finding(
        target=target,
        diagnosis=Diagnosis.under_informed if is_enough else Diagnosis.posterior_collapse,
        has_passed=is_enough and is_at_most(num_dimensions - num_active, limits.max_inactive_units),
        value=information,
        epochs=[final.epoch],
        explanation=f"{information:.2f} nats of mutual information, {num_active} of "
        f"{num_dimensions} dimensions active by their variance",
    )


@criterion(CriterionName.separates_foreground, CriteriaSet.evidence)
def judge_foreground(evidence: Evidence) -> Finding:
    """The scores of the foreground separate it from the background."""
    final = evidence.final
    return _judge_precision(
        evidence,
        precision=final.val_foreground_ap if final else None,
        prevalence=final.val_foreground_share if final else None,
        ratio=evidence.limits.min_foreground_ap_ratio,
        name="foreground",
    )


@criterion(CriterionName.knows_colours, CriteriaSet.evidence)
def judge_colours(evidence: Evidence) -> Finding:
    """The scores of each colour separate its cells from all others, on average."""
    final = evidence.final
    return _judge_precision(
        evidence,
        precision=final.val_colour_ap if final else None,
        prevalence=final.val_colour_prevalence if final else None,
        ratio=evidence.limits.min_colour_ap_ratio,
        name="colours",
    )


def _judge_precision(
    evidence: Evidence,
    *,
    precision: float | None,
    prevalence: float | None,
    ratio: float,
    name: str,
) -> Finding:
    """Of positives that are more than a share of 1 / `ratio`, not even perfect scores reach it: at
    most half of the way from random to perfect scores is asked."""
    target = f"average precision of the {name} at least {ratio:g}x that of random scores"
    final = evidence.final
    if final is None:
        return Finding(target=target)
    if precision is None or not prevalence:
        return _lack_data(evidence, target=target)
    limit = min(ratio * prevalence, (1 + prevalence) / 2)
    return Finding(
        target=f"{target}, here {limit:.3f}",
        diagnosis=Diagnosis.under_informed,
        has_passed=is_at_least(precision, limit),
        value=precision,
        epochs=[final.epoch],
        explanation=f"average precision {precision:.3f}, {precision / prevalence:.1f}x the "
        f"{prevalence:.4f} of random scores",
    )


@criterion(CriterionName.paints_truthfully, CriteriaSet.evidence)
def judge_painting(evidence: Evidence) -> Finding:
    """About as many cells are painted as there is foreground, and enough of them rightly."""
    limits = evidence.limits
    target = (
        f"painted share of the cells within a factor {limits.max_painted_ratio:g} of the share of "
        f"the foreground, and precision at least {limits.min_precision_to_recall:g} of recall"
    )
    painting = Painting.of(evidence)
    if painting is None:
        return Finding(target=target)
    if evidence.is_older_than_measures or painting.ratio is None:
        return _lack_data(evidence, target=target)
    is_near = is_at_least(painting.ratio, 1 / limits.max_painted_ratio) and is_at_most(
        painting.ratio, limits.max_painted_ratio
    )
    return Finding(
        target=target,
        diagnosis=painting.diagnose(evidence),
        has_passed=is_near and _is_precise(painting, limit=limits.min_precision_to_recall),
        value=painting.ratio,
        epochs=[painting.epoch],
        explanation=_describe_painting(painting),
    )


def _is_precise(painting: Painting, *, limit: float) -> bool:
    if painting.precision is None or painting.recall is None:
        return False  # nothing is painted
    return is_at_least(painting.precision, limit * painting.recall)


def _describe_painting(painting: Painting) -> str:
    shares = f"{painting.painted_share:.1%} of the cells painted"
    if painting.foreground_share is not None:
        shares += f" where {painting.foreground_share:.1%} are foreground"
    if painting.precision is None or painting.recall is None:
        return shares
    return f"{shares}, precision {painting.precision:.2f}, recall {painting.recall:.2f}"


@criterion(CriterionName.generalises, CriteriaSet.evidence)
def judge_generalisation(evidence: Evidence) -> Finding:
    """Grids that the model was not trained on are reconstructed about as well."""
    gap_limit, final = evidence.limits.max_generalisation_gap, evidence.final
    target = f"reconstruction loss of validation at most {gap_limit:.0%} above that of training"
    if final is None:
        return Finding(target=target)
    train, val = final.train_recon_loss, final.val_recon_loss
    return Finding(
        target=target,
        diagnosis=Diagnosis.overfitted,
        has_passed=rises_at_most(train, val, share=gap_limit),
        value=compute_rise(train, val),
        epochs=[final.epoch],
        explanation=f"reconstruction loss {val:.4f} in validation, {train:.4f} in training",
    )


def _lack_data(evidence: Evidence, *, target: str, reason: str = NO_FOREGROUND) -> Finding:
    if evidence.is_older_than_measures:
        return Finding(target=target, explanation=_TOO_OLD)
    if not evidence.lacks_foreground:
        reason = _NOT_FINITE
    return Finding(target=target, explanation=reason, is_not_applicable=True)
