"""The configuration of a job: all settings of its training, and its identity."""

import hashlib
import json
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from server.errors import ConflictError
from server.models.names import EntityName
from server.models.options import (
    EFFECTIVE_NUMBER_BETA,
    QUICK_TEST,
    BetaSchedule,
    ClassWeighting,
)

#: Colours of a grid; colour 0 is the background.
NUM_COLOURS: Final = 10
#: Nats per cell below which a loss is as good as 0: then the right colour of a cell has a
#: probability of 0.999. Relative changes and ratios of losses are taken as if none were smaller.
NEGLIGIBLE_LOSS: Final = 1e-3
#: Settings that say which run of a configuration a job is, or only what is kept of it.
NOT_IDENTITY: Final = ("seed", "data_seed", "checkpoint_every")
MAX_SEED: Final = 2**31 - 1
#: Settings that were added later, with the values that all jobs had before.
EARLIER_VALUES: Final = {"generator": 1, "effective_number_beta": EFFECTIVE_NUMBER_BETA}


#: Grids of generated data, unless a job says how many.
DEFAULT_NUM_SAMPLES: Final = 100_000


class BuiltInDataset(StrEnum):
    """Data sets that need no file; each is registered in `worker.data`."""

    atomic = "atomic"
    arc = "arc"


def _choose_num_samples(dataset: str) -> int | None:
    """A user's own data are used completely."""
    return DEFAULT_NUM_SAMPLES if dataset in set(BuiltInDataset) else None


class TrainingConfig(BaseModel):
    """All settings of a job's training; a job stores them completely."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    dataset: EntityName = Field(
        default=BuiltInDataset.atomic.value,
        description="`atomic` (generated), `arc` (the real ARC-AGI tasks), or the name of an "
        ".npz file in the data directory's `datasets/`",
    )
    num_samples: int | None = Field(
        default_factory=lambda validated: _choose_num_samples(validated["dataset"]),
        ge=100,
        le=1_000_000,
        description="number of grids over all splits: `atomic` generates exactly this many, of "
        "other data sets a random sample of at most each split's share of it is used; null, the "
        f"default, is {DEFAULT_NUM_SAMPLES:,} for `atomic` and `arc`, and all grids of a file",
    )
    generator: int = Field(
        default=2,
        ge=1,
        le=2,
        description="version of what the seeds give: with 2 no validation or test grid of `atomic` "
        "and `arc` occurs in training, not even turned or reflected, splits are cut to a random "
        "sample, and the initial weights have random numbers of their own; 1 is as in older jobs",
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
    effective_number_beta: float = Field(
        default=EFFECTIVE_NUMBER_BETA,
        ge=0,
        lt=1,
        description="β of the weighting `effective_number`, not of the KL; all colours with far "
        "more than 1 / (1 - β) cells in the training split weigh the same",
    )
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
        description="of the generated grids, of the split of data that has none and of the grids "
        "to which `num_samples` cuts a data set; by default the same number as `seed`",
    )

    @property
    def seeds(self) -> tuple[int, int]:
        """What tells the runs of one configuration apart."""
        return self.seed, self.data_seed

    @field_validator("num_samples")
    @classmethod
    def _choose_number(cls, value: int | None, info: ValidationInfo) -> int | None:
        """Generated data have no end: null is their default."""
        return _choose_num_samples(info.data.get("dataset", "")) if value is None else value


def list_effects(config: TrainingConfig) -> dict[str, Any]:
    """The identity of a configuration less the settings that have no effect beside the others.

    Jobs with the same effects and the same seeds are trained alike to the last bit.
    """
    effects = config.model_dump(mode="json", exclude={*NOT_IDENTITY, "use_focal_loss"})
    if not config.use_focal_loss:
        effects["focal_gamma"] = 0.0
    if config.class_weighting == ClassWeighting.balanced:
        effects["class_weighting"] = ClassWeighting.inverse.value
    if config.class_weighting != ClassWeighting.effective_number:
        del effects["effective_number_beta"]
    if config.beta_schedule != BetaSchedule.linear_warmup:
        del effects["beta_warmup_fraction"]
    return effects


def resolve_config(
    preset: Mapping[str, Any],
    *,
    quick_test: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> TrainingConfig:
    """An option's preset, then the quick test, then the overrides.

    Raises pydantic.ValidationError, and StoredConfigError if the preset alone is refused.
    """
    quick = QUICK_TEST if quick_test else {}
    try:
        return TrainingConfig.model_validate({**preset, **quick, **(overrides or {})})
    except ValidationError:
        _check_preset(preset)
        raise


def read_config(stored: Mapping[str, Any]) -> TrainingConfig:
    """A stored configuration, to be shown or judged; a setting that was added after it has the
    value from before.

    Another version of Losslab may have stored it. Settings that this one does not know are left
    out, and values that it would refuse stay as they are if they have the right type.
    """
    values = {**EARLIER_VALUES, **stored}
    try:
        return TrainingConfig.model_validate(values)
    except ValidationError as error:
        refused = {str(item["loc"][0]) for item in error.errors()}
    accepted = {
        name: value
        for name, value in values.items()
        # Null stands for all grids, but only of data whose name is accepted.
        if name not in refused and value is not None
    }
    config = TrainingConfig.model_validate(accepted)
    kept = {
        name: values[name]
        for name in refused & TrainingConfig.model_fields.keys() & values.keys()
        if _is_alike(values[name], getattr(config, name))
    }
    return config.model_copy(update=kept)


def _is_alike(value: Any, default: str | float | bool) -> bool:
    """Whether a value can be shown and calculated with where the default can."""
    if isinstance(default, bool | str):
        return isinstance(value, str if isinstance(default, str) else bool)
    kinds = (int,) if isinstance(default, int) else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool)


def fill_in(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting that is stored, and the value of each that is not."""
    config = read_config(stored)
    return {name: getattr(config, name) for name in TrainingConfig.model_fields} | dict(stored)


def _check_preset(preset: Mapping[str, Any]) -> None:
    """Raises StoredConfigError if another version stored settings that this one does not take."""
    try:
        TrainingConfig.model_validate(preset)
    except ValidationError as error:
        raise StoredConfigError(
            "another version of Losslab stored the settings of this option, and this one cannot "
            f"train with them: {_list_problems(error)}"
        ) from None


def _list_problems(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())


def check_config(stored: Mapping[str, Any]) -> TrainingConfig:
    """A stored configuration that a job is to be trained with.

    Raises StoredConfigError if it has settings or values that this version does not know.
    """
    try:
        return TrainingConfig.model_validate({**EARLIER_VALUES, **stored})
    except ValidationError as error:
        raise StoredConfigError(
            "another version of Losslab stored this configuration, and this one cannot train with "
            f"it: {_list_problems(error)}"
        ) from None


class StoredConfigError(ConflictError):
    """The stored configuration of a job or an option is of another version; the message says what
    is unknown."""


def count_steps(num_train: int, *, epochs: int, batch_size: int) -> int:
    """The steps of a training: each epoch has as many whole batches as its grids fill."""
    return epochs * (num_train // min(batch_size, num_train))


def compute_config_sha256(config: TrainingConfig, *, dataset_sha256: str | None = None) -> str:
    """The identity of a configuration: jobs that share it differ only in their randomness.

    SHA-256 of the canonical JSON (sorted keys, no spaces) of all settings but `NOT_IDENTITY`. The
    hash of an uploaded data set stands in place of its name. A setting of `EARLIER_VALUES` counts
    only where it has another value, so that jobs from before there was the setting keep their
    identity, and new jobs like them share it.
    """
    settings = config.model_dump(mode="json", exclude=set(NOT_IDENTITY))
    for name, value in EARLIER_VALUES.items():
        if settings[name] == value:
            del settings[name]
    if dataset_sha256 is not None:
        settings["dataset"] = dataset_sha256
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
