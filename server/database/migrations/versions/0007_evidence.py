"""Measures of what a model knows; the criteria of a study; the best epoch by likelihood; the values
that stored configurations imply for the settings that are new."""

import json

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
#: New settings, as every job had them before. Identities stay: there these values do not count.
_EARLIER_VALUES = {"generator": 1, "effective_number_beta": 0.9999}


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
    _store_earlier_values()


def _store_earlier_values() -> None:
    """Add the settings to every job's configuration and to that of every study's arms."""
    connection = op.get_bind()
    values = {"values": json.dumps(_EARLIER_VALUES)}
    # The text is changed by the database: reading 30,000 configurations would take far longer.
    # Settings that are there already stay.
    if connection.dialect.name == "sqlite":
        update_jobs = "UPDATE job SET config = json_patch(:values, config)"
        update_arms = """
            UPDATE study SET arms = (
                SELECT json_group_array(
                    json_set(
                        value, '$.config', json_patch(:values, json_extract(value, '$.config'))
                    )
                )
                FROM (SELECT value FROM json_each(study.arms) ORDER BY key)
            )
        """
    else:
        update_jobs = "UPDATE job SET config = CAST(:values AS jsonb) || CAST(config AS jsonb)"
        update_arms = """
            UPDATE study SET arms = (
                SELECT json_agg(
                    jsonb_set(arm, '{config}', CAST(:values AS jsonb) || (arm -> 'config'))
                    ORDER BY place
                )
                FROM jsonb_array_elements(CAST(study.arms AS jsonb))
                    WITH ORDINALITY AS each (arm, place)
            )
        """
    connection.execute(sa.text(update_jobs), values)
    connection.execute(sa.text(update_arms), values)
