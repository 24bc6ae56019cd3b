"""Values of the measures of what a model knows, as a training with a like outcome reaches them."""

from typing import Any, Final

from artificial_runs import make_epoch

from server.models.epochs import EpochMetrics

FOREGROUND_SHARE: Final = 0.069
COLOUR_PREVALENCE: Final = 0.0077
#: Painted share, precision, average precision of foreground and colours, IoU at the true share, and
#: mutual information, measured on a GPU after five epochs of 80,000 grids.
REACHED: Final = {
    "healthy": (0.185, 0.25, 0.38, 0.36, 0.26, 8.9),
    "decision_collapse": (0.001, 0.52, 0.36, 0.13, 0.10, 6.2),
    "posterior_collapse": (0.0, None, 0.10, 0.01, 0.01, 0.0),
    "over_painted": (0.63, 0.09, 0.26, 0.27, 0.19, 9.0),
    "out_of_range": (0.15, 0.3, 0.36, 0.34, 0.25, 8.5),
}


def make_measures(
    outcome: str = "healthy", *, factor: float = 1.0, num_dimensions: int = 10
) -> dict[str, Any]:
    """The columns of `EpochMetrics`; all but the shares are `factor` of what is reached."""
    painted, precision, foreground_ap, colour_ap, iou, information = REACHED[outcome]
    assert foreground_ap and colour_ap and iou is not None and information is not None
    return {
        "val_background_share": 1 - (painted or 0.0),
        "val_foreground_share": FOREGROUND_SHARE,
        "val_foreground_precision": precision and precision * factor,
        "val_foreground_iou_any_colour": 0.3 * factor,
        "val_colour_iou": 0.2 * factor,
        "val_log_likelihood": -0.3 / factor,
        "val_balanced_log_likelihood": -1.2 / factor,
        "val_foreground_ap": foreground_ap * factor,
        "val_colour_ap": colour_ap * factor,
        "val_colour_prevalence": COLOUR_PREVALENCE,
        "val_matched_shift": 1.5,
        "val_matched_recall": 1.6 * iou * factor,
        "val_matched_precision": 1.6 * iou * factor,
        "val_matched_iou": iou * factor,
        "val_matched_accuracy": 0.92,
        "val_mutual_information": information * factor,
        "val_mutual_information_error": 0.03,
        "val_marginal_kl": 4.0,
        "val_active_units_variance": num_dimensions if information else 0,
        "val_information_per_dimension": [information * factor / num_dimensions] * num_dimensions,
    }


def make_known(outcome: str = "healthy", **values: Any) -> EpochMetrics:
    paints = {"val_foreground_iou": 0.2, "val_kl_per_dimension": [1.5] * 10}
    return make_epoch(**paints | make_measures(outcome) | values)
