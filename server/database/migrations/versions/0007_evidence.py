"""Measures of what a model knows; the criteria of a study; the best epoch by likelihood."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"

#: By confusion, of both splits.
_OF_BOTH_SPLITS = (
    "foreground_share",
    "foreground_precision",
    "foreground_iou_any_colour",
    "colour_iou",
)
#: By likelihood, order and latent, of the validation split.
_OF_VALIDATION = (
    "log_likelihood",
    "balanced_log_likelihood",
    "foreground_ap",
    "colour_ap",
    "colour_prevalence",
    "matched_shift",
    "matched_recall",
    "matched_precision",
    "matched_iou",
    "matched_accuracy",
    "mutual_information",
    "mutual_information_error",
    "marginal_kl",
)


def upgrade() -> None:
    # Epochs that were recorded before have no value.
    names = [f"{split}_{name}" for split in ("train", "val") for name in _OF_BOTH_SPLITS]
    for name in [*names, *(f"val_{name}" for name in _OF_VALIDATION)]:
        op.add_column("epoch_metrics", sa.Column(name, sa.Float(), nullable=True))
    op.add_column(
        "epoch_metrics", sa.Column("val_active_units_variance", sa.Integer(), nullable=True)
    )
    op.add_column(
        "epoch_metrics", sa.Column("val_information_per_dimension", sa.JSON(), nullable=True)
    )
    op.add_column("job", sa.Column("best_likelihood_epoch", sa.Integer(), nullable=True))
    op.add_column("job", sa.Column("best_val_log_likelihood", sa.Float(), nullable=True))
    op.add_column("job", sa.Column("likelihood_test_metrics", sa.JSON(), nullable=True))
    op.add_column(
        "study", sa.Column("criteria", sa.String(20), nullable=False, server_default="spec")
    )
