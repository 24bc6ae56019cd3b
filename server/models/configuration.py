"""The configuration of a job: all settings of its training."""

from enum import StrEnum
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field

from server.models.options import OPTIONS, QUICK_TEST, BetaSchedule, ClassWeighting, Option

#: Colours of a grid; colour 0 is the background.
NUM_COLOURS: Final = 10
DATASET_NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"


class BuiltInDataset(StrEnum):
    """Data sets that need no file; each is registered in `worker.data`."""

    atomic = "atomic"
    arc = "arc"


class TrainingConfig(BaseModel):
    """All settings of a job's training; a job stores them completely."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    dataset: Annotated[str, Field(pattern=DATASET_NAME_PATTERN)] = Field(
        default=BuiltInDataset.atomic.value,
        description="`atomic` (generated), `arc` (the real ARC-AGI tasks), or the name of an "
        ".npz file in the data directory's `datasets/`",
    )
    num_samples: int = Field(
        default=100_000,
        ge=100,
        le=1_000_000,
        description="number of grids over all splits: `atomic` generates exactly this many, other "
        "data sets are cut to at most each split's share of it",
    )
    augment: bool = Field(
        default=True,
        description="rotate or reflect each training grid at random, whenever it is drawn",
    )
    epochs: int = Field(default=50, ge=1, le=1000)
    batch_size: int = Field(default=128, ge=2, le=4096)
    learning_rate: float = Field(default=1e-3, gt=0, le=1)
    min_learning_rate: float = Field(
        default=1e-5,
        ge=0,
        le=1,
        description="end of the cosine decay, if `learning_rate` is above it",
    )
    max_grad_norm: float = Field(default=1.0, gt=0, le=1000)
    latent_dim: int = Field(default=10, ge=1, le=256)
    beta: float = Field(
        default=1.0, ge=0, le=1000, description="weight of the KL; 1 is the plain ELBO"
    )
    beta_schedule: BetaSchedule = BetaSchedule.linear_warmup
    beta_warmup_fraction: float = Field(
        default=0.2, ge=0, le=1, description="share of the job's steps in which β rises from 0"
    )
    free_bits: float = Field(
        default=0.0, ge=0, le=10, description="lower bound of each dimension's KL, in nats"
    )
    use_focal_loss: bool = Field(default=True, description="false is plain cross-entropy")
    focal_gamma: float = Field(default=2.0, ge=0, le=10)
    class_weighting: ClassWeighting = ClassWeighting.none
    checkpoint_every: int = Field(
        default=5, ge=1, le=1000, description="epochs between scheduled checkpoints"
    )
    seed: int = Field(default=42, ge=0, le=2**31 - 1)


def resolve_config(
    option: Option, *, quick_test: bool = False, overrides: dict[str, Any] | None = None
) -> TrainingConfig:
    """The option's preset, then the quick test, then the overrides.

    Raises pydantic.ValidationError.
    """
    quick = QUICK_TEST if quick_test else {}
    return TrainingConfig.model_validate({**OPTIONS[option].config, **quick, **(overrides or {})})
