"""The table of the metrics of each epoch."""

from datetime import datetime

from pydantic import StrictFloat
from sqlalchemy import Column, Integer
from sqlmodel import Field as Col
from sqlmodel import SQLModel

from server.models.columns import (
    UTCDateTime,
    job_id_column,
    json_type,
    store_finite_numbers,
    utc_now,
)


class EpochMetrics(SQLModel, table=True):
    """The metrics of one epoch. Shares and rates are 0 to 1; a rate without cases is null."""

    __tablename__ = "epoch_metrics"

    job_id: str = Col(sa_column=job_id_column(primary_key=True))
    epoch: int = Col(sa_column=Column(Integer, primary_key=True, autoincrement=False))
    attempt: int
    recorded_at: datetime = Col(default_factory=utc_now, sa_type=UTCDateTime)
    seconds: float
    grids_per_second: float
    beta: float  # at the epoch's last step
    learning_rate: float  # at the epoch's last step
    num_loss_spikes: int  # steps above 3x the running median of the loss
    max_spike_ratio: float | None  # largest step loss over its running median

    # Over the epoch's own batches in train mode.
    train_loss: float
    train_recon_loss: float
    train_kl_loss: float  # Σ max(KL_d, free_bits) / cells, as in the loss
    train_pixel_accuracy: float
    train_foreground_recall: float | None
    train_foreground_iou: float | None
    train_balanced_accuracy: float | None
    train_background_share: float  # share of cells predicted as background
    train_all_black_share: float  # share of reconstructions that are all background
    train_exact_grid_rate: float
    train_recall_per_colour: list[float | None] = Col(sa_type=json_type(list[StrictFloat | None]))
    train_kl_per_dimension: list[float] = Col(sa_type=json_type(list[StrictFloat | None]))  # nats
    train_active_units: int  # dimensions with KL above 0.05 nats
    # Epochs of older versions lack these and the last ones of validation.
    train_foreground_share: float | None = None  # share of cells that are foreground
    train_foreground_precision: float | None = None
    train_foreground_iou_any_colour: float | None = None
    train_colour_iou: float | None = None  # mean over the foreground colours

    # Over the validation split in eval mode.
    val_loss: float
    val_recon_loss: float
    val_kl_loss: float
    val_pixel_accuracy: float
    val_foreground_recall: float | None
    val_foreground_iou: float | None
    val_balanced_accuracy: float | None
    val_background_share: float
    val_all_black_share: float
    val_exact_grid_rate: float
    val_recall_per_colour: list[float | None] = Col(sa_type=json_type(list[StrictFloat | None]))
    val_kl_per_dimension: list[float] = Col(sa_type=json_type(list[StrictFloat | None]))
    val_active_units: int
    val_foreground_share: float | None = None
    val_foreground_precision: float | None = None
    val_foreground_iou_any_colour: float | None = None
    val_colour_iou: float | None = None
    val_log_likelihood: float | None = None  # nats per cell, without class weights
    val_balanced_log_likelihood: float | None = None  # nats per cell, each colour alike
    val_foreground_ap: float | None = None  # average precision of 1 - p_0
    val_colour_ap: float | None = None  # mean average precision of p_c over foreground colours
    val_colour_prevalence: float | None = None  # the colour_ap of a model that knows nothing
    # With the background's logit shifted until the painted share is the true one.
    val_matched_shift: float | None = None
    val_matched_recall: float | None = None
    val_matched_precision: float | None = None
    val_matched_iou: float | None = None
    val_matched_accuracy: float | None = None
    val_mutual_information: float | None = None  # nats, of grid and latent
    val_mutual_information_error: float | None = None  # standard error
    val_marginal_kl: float | None = None  # nats, from the aggregated posterior to the prior
    val_active_units_variance: int | None = None  # dimensions with Var(mu) above 0.01
    #: Nats.
    val_information_per_dimension: list[float] | None = Col(
        default=None, sa_type=json_type(list[StrictFloat | None] | None)
    )


store_finite_numbers(EpochMetrics)
