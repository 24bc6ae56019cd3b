"""What the API takes for studies: arms from options and a grid, seeds, thresholds."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)
from sqlmodel import Session

from server.api.requests import (
    MAX_STUDY_LABEL_BYTES,
    JsonBody,
    Name,
    OptionConfig,
    OptionName,
    StudyLabels,
)
from server.errors import ConflictError, InvalidInputError
from server.files.inspection import check_dataset
from server.files.npz import DatasetError
from server.jobs.options import Option, choose_option, read_options
from server.jobs.studies import MAX_ARMS, MAX_SEEDS
from server.judging.criteria import CriteriaSet, Thresholds
from server.judging.statistics import PLANNED_LOOKS, plan_looks
from server.models.configuration import (
    MAX_SEED,
    TrainingConfig,
    check_config,
    compute_config_sha256,
    list_effects,
    resolve_config,
)
from server.models.studies import Arm, Study
from server.patterns import ONE_LINE

DEFAULT_NUM_SEEDS: Final = 5
DEFAULT_MAX_SEEDS: Final = 40
MAX_ARM_NAME_LENGTH: Final = 180
#: A longer key is no setting, and would fill the answer.
_MAX_KEY_SHOWN: Final = 50

_STUDY_EXAMPLES: list[JsonValue] = [
    {"options": ["a", "b", "c"], "num_seeds": 5, "quick_test": True},
    {"name": "weight of the KL", "options": ["b"], "grid": {"beta": [0.5, 1, 2]}},
    {
        "options": ["b", {"name": "b with free bits", "base": "b", "config": {"free_bits": 0.1}}],
        "until_decided": True,
        "max_seeds": 20,
        "quick_test": True,
    },
]


def _refuse_words(value: Any) -> Any:
    """In a list the types of `JsonBody` are not checked."""
    if isinstance(value, str | bool):
        raise ValueError("must be a number")
    return value


def _read_scalar(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    """One error instead of one for each type that a value may have."""
    if not isinstance(value, bool | int | float | str):
        raise ValueError("must be a number, a text, true or false")
    return read(value)


def _read_arm(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    """The errors of what was meant: an option's name, or an arm."""
    if isinstance(value, dict):
        return ArmRequest.model_validate(value)
    if isinstance(value, str):
        return _OPTION_NAME.validate_python(value)
    if isinstance(value, ArmRequest):
        return read(value)
    raise ValueError("must be the name of an option, or an arm with name, base and config")


Seed = Annotated[int, Field(ge=0, le=MAX_SEED), BeforeValidator(_refuse_words)]
#: One line of text, as of a job, but short enough for a legend.
ArmName = Annotated[str, Field(min_length=1, max_length=64), ONE_LINE]
_OPTION_NAME: Final[TypeAdapter[str]] = TypeAdapter(OptionName)
GridValue = Annotated[bool | int | float | str, WrapValidator(_read_scalar)]


class StudyError(InvalidInputError):
    """A field of a study's request is invalid; the message says what is allowed."""

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message)
        self.field = field


class ArmRequest(JsonBody):
    """An arm that is no option: a base and the settings in which it differs."""

    model_config = ConfigDict(extra="forbid")

    name: ArmName
    base: OptionName
    config: OptionConfig = Field(default_factory=OptionConfig)


class StudyThresholds(Thresholds, JsonBody):
    """Thresholds that differ from the defaults."""


class StudyConfig(TrainingConfig, JsonBody):
    """Settings of all arms. `data_seed` null gives each seed a data set of its own."""

    data_seed: Seed | None = None  # type: ignore[assignment]

    @field_validator("seed")
    @classmethod
    def _refuse_seed(cls, _value: int) -> int:
        raise ValueError("belongs to a job; a study has `seeds` or `num_seeds`")


class StudyRequest(JsonBody):
    """Options times seeds, to be judged as groups."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": _STUDY_EXAMPLES})

    name: Name | None = None
    options: list[Annotated[OptionName | ArmRequest, WrapValidator(_read_arm)]] = Field(
        min_length=1, max_length=MAX_ARMS
    )
    grid: dict[str, list[GridValue]] = Field(
        default_factory=dict,
        max_length=MAX_ARMS,
        description="values of settings; each option is combined with each combination of them",
    )
    num_seeds: int | None = Field(
        default=None,
        ge=1,
        le=MAX_SEEDS,
        description=f"seeds 0, 1, … of each arm; {DEFAULT_NUM_SEEDS} unless `seeds` are given",
    )
    seeds: list[Seed] | None = Field(default=None, min_length=1, max_length=MAX_SEEDS)
    quick_test: bool = Field(default=False, description="5 epochs, a checkpoint each epoch")
    config: StudyConfig = Field(default_factory=StudyConfig, description="settings of all arms")
    criteria: CriteriaSet = Field(
        default=CriteriaSet.spec, description="the set of criteria that decides"
    )
    thresholds: StudyThresholds = Field(default_factory=StudyThresholds)
    reuse: bool = Field(
        default=False,
        description="take finished jobs of the same configuration and seed instead of training "
        "them again",
    )
    until_decided: bool = Field(
        default=False,
        description="a race: arms that are ruled out get no further seeds, and the others get "
        f"those of the next look ({', '.join(map(str, PLANNED_LOOKS))} seeds) until one arm is "
        "decided",
    )
    max_seeds: int = Field(
        default=DEFAULT_MAX_SEEDS, ge=1, le=MAX_SEEDS, description="of each arm of a race"
    )
    priority: int = Field(default=0, ge=-100, le=100, description="higher runs first")
    metadata: StudyLabels = Field(
        default_factory=dict,
        description="your own labels, which its jobs have too; at most "
        f"{MAX_STUDY_LABEL_BYTES} bytes in all",
    )

    def list_seeds(self) -> list[int]:
        """The seeds to queue at once; of a race, those of its first look."""
        if self.seeds is not None:
            return list(self.seeds)
        if self.until_decided and self.num_seeds is None:
            return list(range(min(PLANNED_LOOKS[0], self.max_seeds)))
        return list(range(self.num_seeds or DEFAULT_NUM_SEEDS))

    @property
    def largest_num_seeds(self) -> int:
        return self.max_seeds if self.until_decided else len(self.list_seeds())

    def make_study(self, session: Session, *, datasets_dir: Path) -> Study:
        """The requested study, not stored yet, and without seeds.

        Raises StudyError, UnknownOptionError and DatasetError.
        """
        _check_seeds(self)
        for key, values in self.grid.items():
            _check_grid_values(key, values)
        arms = _make_arms(self, read_options(session), session=session, datasets_dir=datasets_dir)
        looks = plan_looks(self.largest_num_seeds)
        return Study(
            name=self.name,
            labels=self.metadata,
            priority=self.priority,
            quick_test=self.quick_test,
            arms=[arm.model_dump(mode="json") for arm in arms],
            seeds=[],
            data_seed=_choose_data_seed(self.config, arms),
            looks=looks,
            num_planned_looks=len(looks),
            until_decided=self.until_decided,
            max_seeds=self.largest_num_seeds,
            criteria=self.criteria.value,
            thresholds=self.thresholds.model_dump(exclude_defaults=True),
            reuse=self.reuse,
        )


class SeedsRequest(JsonBody):
    """Further seeds of a study."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"num": 5}]})

    num: int = Field(ge=1, le=MAX_SEEDS, description="seeds of each arm; of a race, of each kept")


@dataclass(frozen=True, slots=True)
class _Base:
    """An arm before the grid: its name, the option that its jobs name, and its settings."""

    name: str
    option: Option
    own: Mapping[str, Any]  # override those of all arms
    field: str  # of the request


def _check_seeds(request: StudyRequest) -> None:
    """Raises StudyError."""
    if request.seeds is not None:
        if request.num_seeds is not None:
            raise StudyError("give either seeds or num_seeds, not both", field="seeds")
        if len(set(request.seeds)) < len(request.seeds):
            raise StudyError("each seed may be given only once", field="seeds")
        if request.until_decided:
            raise StudyError("a race (until_decided) chooses its seeds itself", field="seeds")
    if request.until_decided and (request.num_seeds or 1) > request.max_seeds:
        raise StudyError(f"at most max_seeds, {request.max_seeds}", field="num_seeds")
    if not request.until_decided and "max_seeds" in request.model_fields_set:
        raise StudyError("only a race (until_decided) has max_seeds", field="max_seeds")


def _check_grid_values(key: str, values: Sequence[GridValue]) -> None:
    """Raise StudyError unless the setting exists and may have each of the values."""
    field = f"grid.{key[:_MAX_KEY_SHOWN]}"
    if key in ("seed", "data_seed"):
        raise StudyError("all arms have the same seeds, see `seeds` and `num_seeds`", field=field)
    if key not in TrainingConfig.model_fields:
        raise StudyError(
            "there is no such setting; see GET /options for the known settings", field=field
        )
    if not values:
        raise StudyError("needs at least one value", field=field)
    for place, value in enumerate(values):
        try:
            OptionConfig.model_validate({key: value})
        except ValidationError as error:
            message = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise StudyError(f"{message}{_quote(value)}", field=f"{field}.{place}") from None


def _quote(value: GridValue) -> str:
    """What was sent, if it is short."""
    return f", not {value!r}" if len(repr(value)) <= _MAX_KEY_SHOWN else ""


def _make_arms(
    request: StudyRequest, options: Mapping[str, Option], *, session: Session, datasets_dir: Path
) -> list[Arm]:
    """Each option at each point of the grid."""
    bases = [
        _choose_base(each, options, session=session, place=place)
        for place, each in enumerate(request.options)
    ]
    num_arms = len(bases) * math.prod(len(values) for values in request.grid.values())
    if num_arms > MAX_ARMS:
        raise StudyError(f"{num_arms} arms; {MAX_ARMS} are allowed", field=_name_arms(request))
    points = [
        dict(zip(request.grid, values, strict=True))
        for values in itertools.product(*request.grid.values())
    ]
    arms = [
        _make_arm(request, base, point, datasets_dir=datasets_dir)
        for base in bases
        for point in points
    ]
    _refuse_twins(arms, field=_name_arms(request))
    return arms


def _name_arms(request: StudyRequest) -> str:
    return "grid" if request.grid else "options"


def _choose_base(
    wanted: str | ArmRequest, options: Mapping[str, Option], *, session: Session, place: int
) -> _Base:
    field = f"options.{place}"
    if isinstance(wanted, str):
        return _Base(wanted, choose_option(session, wanted, field=field), {}, field)
    if wanted.name in options:
        message = f"{wanted.name!r} is the name of an option; use another name"
        raise StudyError(message, field=f"{field}.name")
    base = choose_option(session, wanted.base, field=f"{field}.base")
    own = wanted.config.model_dump(mode="json", exclude_unset=True)
    return _Base(wanted.name, base, own, field)


def _make_arm(
    request: StudyRequest, base: _Base, point: Mapping[str, GridValue], *, datasets_dir: Path
) -> Arm:
    common = request.config.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    config = resolve_config(
        base.option.preset,
        quick_test=request.quick_test,
        overrides={**common, **base.own, **point},
    )
    name = " ".join([base.name, *(f"{key}={_show(value)}" for key, value in point.items())])
    if len(name) > MAX_ARM_NAME_LENGTH:
        message = f"the name of an arm would have {len(name)} characters; {MAX_ARM_NAME_LENGTH} "
        raise StudyError(message + "are allowed: vary fewer settings", field="grid")
    dataset_sha256 = _check_dataset(request, base, point, config, datasets_dir=datasets_dir)
    return Arm(
        name=name,
        option=base.option.name,
        config=config.model_dump(mode="json"),
        config_sha256=compute_config_sha256(config, dataset_sha256=dataset_sha256),
    )


def _check_dataset(
    request: StudyRequest,
    base: _Base,
    point: Mapping[str, GridValue],
    config: TrainingConfig,
    *,
    datasets_dir: Path,
) -> str | None:
    """Raises StudyError, which names the field that chose the data set."""
    try:
        return check_dataset(config.dataset, datasets_dir=datasets_dir)
    except DatasetError as error:
        if "dataset" in point:
            place = request.grid["dataset"].index(point["dataset"])
            field = f"grid.dataset.{place}"
        elif "dataset" in base.own:
            field = f"{base.field}.config.dataset"
        elif "dataset" in request.config.model_fields_set:
            field = "config.dataset"
        else:
            field = base.field
        raise StudyError(str(error), field=field) from None


def _show(value: GridValue) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _refuse_twins(arms: Sequence[Arm], *, field: str) -> None:
    """Raise StudyError if two arms have one name, or would be trained alike."""
    names: dict[str, str] = {}
    for arm in arms:
        if arm.name in names.values():
            raise StudyError(f"the arm {arm.name!r} is there twice", field=field)
        effects = json.dumps(list_effects(arm.training_config))
        if twin := names.get(effects):
            raise StudyError(
                f"the arms {twin!r} and {arm.name!r} have the same configuration, or differ only "
                "in settings that have no effect there",
                field=field,
            )
        names[effects] = arm.name


def _choose_data_seed(config: StudyConfig, arms: Sequence[Arm]) -> int | None:
    """The seed of the data of all jobs; None for each job's own seed."""
    if "data_seed" in config.model_fields_set:
        return config.data_seed
    default: int = arms[0].config["data_seed"]
    return default


def check_datasets(study: Study, *, datasets_dir: Path) -> None:
    """Raise ConflictError unless the study's jobs would still train on the same data."""
    for arm in study.arm_list:
        config = check_config(arm.config)
        try:
            sha256 = check_dataset(config.dataset, datasets_dir=datasets_dir)
        except DatasetError as error:
            raise ConflictError(f"study {study.id}: {error}") from None
        if compute_config_sha256(config, dataset_sha256=sha256) != arm.config_sha256:
            raise ConflictError(
                f"study {study.id} began with another data set of the name {config.dataset!r}"
            )
