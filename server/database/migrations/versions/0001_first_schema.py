"""The first schema."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "job",
        sa.Column("id", sa.String(length=12), nullable=False),
        sa.Column("name", sa.String(), nullable=True),
        sa.Column(
            "option",
            sa.Enum(
                "a", "b", "c", name="option", native_enum=False, create_constraint=True, length=20
            ),
            nullable=False,
        ),
        sa.Column("quick_test", sa.Boolean(), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("config", sa.JSON(), nullable=False),
        sa.Column(
            "status",
            sa.Enum(
                "queued",
                "running",
                "paused",
                "succeeded",
                "failed",
                "cancelled",
                name="jobstatus",
                native_enum=False,
                create_constraint=True,
                length=20,
            ),
            nullable=False,
        ),
        sa.Column(
            "phase",
            sa.Enum(
                "loading_data",
                "training",
                "evaluating",
                "saving",
                name="jobphase",
                native_enum=False,
                create_constraint=True,
                length=20,
            ),
            nullable=True,
        ),
        sa.Column("progress", sa.Float(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("num_lost_attempts", sa.Integer(), nullable=False),
        sa.Column("worker_id", sa.String(), nullable=True),
        sa.Column("lease_expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("cancel_requested_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("error_code", sa.String(), nullable=True),
        sa.Column("error_message", sa.String(), nullable=True),
        sa.Column(
            "failure_kind",
            sa.Enum(
                "user",
                "oom",
                "numeric",
                "infrastructure",
                "timeout",
                name="failurekind",
                native_enum=False,
                create_constraint=True,
                length=20,
            ),
            nullable=True,
        ),
        sa.Column("epochs_completed", sa.Integer(), nullable=False),
        sa.Column("best_epoch", sa.Integer(), nullable=True),
        sa.Column("best_val_recon_loss", sa.Float(), nullable=True),
        sa.Column("train_loss", sa.Float(), nullable=True),
        sa.Column("train_pixel_accuracy", sa.Float(), nullable=True),
        sa.Column("val_foreground_recall", sa.Float(), nullable=True),
        sa.Column("val_foreground_iou", sa.Float(), nullable=True),
        sa.Column("device", sa.String(), nullable=True),
        sa.Column("dataset_summary", sa.JSON(), nullable=True),
        sa.Column("test_metrics", sa.JSON(), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    with op.batch_alter_table("job", schema=None) as batch_op:
        batch_op.create_index("ix_job_created_at_id", ["created_at", "id"], unique=False)
        batch_op.create_index(batch_op.f("ix_job_name"), ["name"], unique=False)
        batch_op.create_index(
            "ix_job_option_status", ["option", "status", "created_at"], unique=False
        )
        batch_op.create_index(
            "ix_job_status_priority", ["status", "priority", "created_at"], unique=False
        )

    op.create_table(
        "worker",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("host", sa.String(), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("device", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("job_id", sa.String(), nullable=True),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("heartbeat_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "artifact",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.String(length=12), nullable=False),
        sa.Column(
            "kind",
            sa.Enum(
                "checkpoint",
                "reconstruction",
                name="artifactkind",
                native_enum=False,
                create_constraint=True,
                length=20,
            ),
            nullable=False,
        ),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("file_name", sa.String(), nullable=False),
        sa.Column("size_bytes", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.String(), nullable=False),
        sa.Column("samples", sa.JSON(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("job_id", "kind", "epoch"),
    )
    op.create_table(
        "epoch_metrics",
        sa.Column("job_id", sa.String(length=12), nullable=False),
        sa.Column("epoch", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("recorded_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("seconds", sa.Float(), nullable=False),
        sa.Column("grids_per_second", sa.Float(), nullable=False),
        sa.Column("beta", sa.Float(), nullable=False),
        sa.Column("learning_rate", sa.Float(), nullable=False),
        sa.Column("num_loss_spikes", sa.Integer(), nullable=False),
        sa.Column("max_spike_ratio", sa.Float(), nullable=True),
        sa.Column("train_loss", sa.Float(), nullable=False),
        sa.Column("train_recon_loss", sa.Float(), nullable=False),
        sa.Column("train_kl_loss", sa.Float(), nullable=False),
        sa.Column("train_pixel_accuracy", sa.Float(), nullable=False),
        sa.Column("train_foreground_recall", sa.Float(), nullable=True),
        sa.Column("train_foreground_iou", sa.Float(), nullable=True),
        sa.Column("train_balanced_accuracy", sa.Float(), nullable=True),
        sa.Column("train_background_share", sa.Float(), nullable=False),
        sa.Column("train_all_black_share", sa.Float(), nullable=False),
        sa.Column("train_exact_grid_rate", sa.Float(), nullable=False),
        sa.Column("train_recall_per_colour", sa.JSON(), nullable=False),
        sa.Column("train_kl_per_dimension", sa.JSON(), nullable=False),
        sa.Column("train_active_units", sa.Integer(), nullable=False),
        sa.Column("val_loss", sa.Float(), nullable=False),
        sa.Column("val_recon_loss", sa.Float(), nullable=False),
        sa.Column("val_kl_loss", sa.Float(), nullable=False),
        sa.Column("val_pixel_accuracy", sa.Float(), nullable=False),
        sa.Column("val_foreground_recall", sa.Float(), nullable=True),
        sa.Column("val_foreground_iou", sa.Float(), nullable=True),
        sa.Column("val_balanced_accuracy", sa.Float(), nullable=True),
        sa.Column("val_background_share", sa.Float(), nullable=False),
        sa.Column("val_all_black_share", sa.Float(), nullable=False),
        sa.Column("val_exact_grid_rate", sa.Float(), nullable=False),
        sa.Column("val_recall_per_colour", sa.JSON(), nullable=False),
        sa.Column("val_kl_per_dimension", sa.JSON(), nullable=False),
        sa.Column("val_active_units", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "epoch"),
    )
    op.create_table(
        "job_event",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.String(length=12), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("message", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id"),
    )
    with op.batch_alter_table("job_event", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_job_event_job_id"), ["job_id"], unique=False)
