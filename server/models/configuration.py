"""The configuration of a job: all settings of its training, and its identity."""

import hashlib
import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field

from server.models.options import NAME_PATTERN, QUICK_TEST, BetaSchedule, ClassWeighting

#: Colours of a grid; colour 0 is the background.
NUM_COLOURS: Final = 10
#: Settings that say which run of a configuration a job is, or only what is kept of it.
NOT_IDENTITY: Final = ("seed", "data_seed", "checkpoint_every")
MAX_SEED: Final = 2**31 - 1


class BuiltInDataset(StrEnum):
    """Data sets that need no file; each is registered in `worker.data`."""

    atomic = "atomic"
    arc = "arc"


class TrainingConfig(BaseModel):
    """All settings of a job's training; a job stores them completely."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    dataset: Annotated[str, Field(pattern=NAME_PATTERN)] = Field(
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
    seed: int = Field(
        default=42,
        ge=0,
        le=MAX_SEED,
        description="of the initial weights, the order of the grids, their symmetries, the "
        "latent noise and the grids in the pictures",
    )
    data_seed: int = Field(
        default_factory=lambda validated: validated["seed"],
        ge=0,
        le=MAX_SEED,
        description="of the generated grids and of the split of data that has none; by default "
        "the same number as `seed`",
    )


def resolve_config(
    preset: Mapping[str, Any],
    *,
    quick_test: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> TrainingConfig:
    """An option's preset, then the quick test, then the overrides.

    Raises pydantic.ValidationError.
    """
    quick = QUICK_TEST if quick_test else {}
    return TrainingConfig.model_validate({**preset, **quick, **(overrides or {})})


def compute_config_sha256(config: TrainingConfig, *, dataset_sha256: str | None = None) -> str:
    """The identity of a configuration: jobs that share it differ only in their randomness.

    SHA-256 of the canonical JSON (sorted keys, no spaces) of all settings but `NOT_IDENTITY`. The
    hash of an uploaded data set stands in place of its name.
    """
    settings = config.model_dump(mode="json", exclude=set(NOT_IDENTITY))
    if dataset_sha256 is not None:
        settings["dataset"] = dataset_sha256
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
