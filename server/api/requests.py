"""What the API takes: the bodies of requests."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationInfo,
    field_validator,
)
from sqlmodel import Session

from server.files.inspection import check_dataset
from server.jobs.options import choose_option
from server.jobs.submission import new_job
from server.models.configuration import TrainingConfig, resolve_config
from server.models.names import EntityName
from server.models.tables import Job
from server.patterns import ONE_LINE, PLAIN_TEXT

MAX_METADATA_PAIRS = 16
#: Of all keys and values, in UTF-8. Each of the two thousand jobs that a study may have gets a copy
#: of its labels, and so do their table and its index.
MAX_LABEL_BYTES, MAX_STUDY_LABEL_BYTES = 4096, 1024

_JOB_EXAMPLES: list[JsonValue] = [
    {"option": "b", "quick_test": True},
    {"option": "a", "name": "baseline", "epochs": 2, "num_samples": 1000, "seed": 7},
    {"option": "c", "dataset": "arc", "quick_test": True, "metadata": {"study": "arc"}},
]

PlainText = Annotated[str, PLAIN_TEXT]
Name = Annotated[str, Field(min_length=1, max_length=200), ONE_LINE]
Summary = Annotated[str, Field(max_length=500), ONE_LINE]
OptionName = Annotated[
    EntityName,
    Field(
        description="`a`, `b`, `c` or an own option; GET /options lists all",
        examples=["b"],
    ),
]
Label = Annotated[str, Field(max_length=512), PLAIN_TEXT]
LabelKey = Annotated[str, Field(min_length=1, max_length=64), PLAIN_TEXT]
Labels = Annotated[
    dict[LabelKey, Label],
    Field(
        max_length=MAX_METADATA_PAIRS,
        # Without this, Pydantic's own schema would allow keys that do not match the pattern.
        json_schema_extra={"additionalProperties": False},
    ),
]


def _limit_bytes(max_bytes: int) -> AfterValidator:
    """All labels together have at most so many bytes. Raises ValueError."""

    def check(labels: dict[str, str]) -> dict[str, str]:
        num_bytes = sum(len(text.encode()) for pair in labels.items() for text in pair)
        if num_bytes > max_bytes:
            raise ValueError(
                f"all keys and values together may have at most {max_bytes} bytes in UTF-8, not "
                f"{num_bytes}"
            )
        return labels

    return AfterValidator(check)


JobLabels = Annotated[Labels, _limit_bytes(MAX_LABEL_BYTES)]
StudyLabels = Annotated[Labels, _limit_bytes(MAX_STUDY_LABEL_BYTES)]


#: The validation context of an HTML form, which sends everything as text.
FORM: Final = {"is_form": True}


class JsonBody(BaseModel):
    """A JSON body with strict types: no text for a number, no number for a boolean."""

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_other_types(cls, value: Any, info: ValidationInfo) -> Any:
        if info.context == FORM or info.field_name is None:
            return value
        kinds = _list_types(cls.model_fields[info.field_name].annotation)
        if bool in kinds and not isinstance(value, bool):
            raise ValueError("must be true or false")
        if kinds & {int, float} and isinstance(value, str | bool):
            raise ValueError("must be a number")
        return value


def _list_types(annotation: Any) -> set[Any]:
    return set(get_args(annotation)) or {annotation}


class JobRequest(TrainingConfig, JsonBody):
    """A loss configuration to train. A setting in the request overrides the option's preset and
    `quick_test`; a setting that is left out follows them."""

    model_config = ConfigDict(json_schema_extra={"examples": _JOB_EXAMPLES})

    option: OptionName
    quick_test: bool = Field(default=False, description="5 epochs, a checkpoint each epoch")
    name: Name | None = None
    metadata: JobLabels = Field(
        default_factory=dict,
        description=f"your own labels, to filter by; at most {MAX_LABEL_BYTES} bytes in all",
    )
    priority: int = Field(default=0, ge=-100, le=100, description="higher runs first")

    def resolve_config(self, preset: Mapping[str, Any]) -> TrainingConfig:
        """The whole configuration, with the preset of the request's option."""
        sent = self.model_fields_set & TrainingConfig.model_fields.keys()
        overrides = self.model_dump(include=sent)
        return resolve_config(preset, quick_test=self.quick_test, overrides=overrides)

    def make_job(self, session: Session, *, datasets_dir: Path) -> Job:
        """The requested job with its whole configuration, not stored yet.

        Raises UnknownOptionError and DatasetError. A data set may take seconds to read, so this is
        called before a write transaction.
        """
        option = choose_option(session, self.option)
        config = self.resolve_config(option.preset)
        return new_job(
            config,
            option=option.name,
            dataset_sha256=check_dataset(config.dataset, datasets_dir=datasets_dir),
            quick_test=self.quick_test,
            name=self.name,
            labels=self.metadata,
            priority=self.priority,
        )


def _hide_seeds(schema: dict[str, Any]) -> None:
    for name in ("seed", "data_seed"):
        del schema["properties"][name]


class OptionConfig(TrainingConfig, JsonBody):
    """The settings in which an option differs from its base; one that is left out is the base's.
    Seeds belong to jobs and studies."""

    # Without this, Pydantic's own schema would allow the seeds.
    model_config = ConfigDict(json_schema_extra=_hide_seeds)

    @field_validator("seed", "data_seed")
    @classmethod
    def _refuse_seeds(cls, _value: int) -> int:
        raise ValueError("belongs to a job or a study, not to an option")


class OptionRequest(JsonBody):
    """An option of your own: a base and the settings in which it differs."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"base": "b", "config": {"free_bits": 0.1}, "summary": "b with free bits"},
            ]
        },
    )

    base: OptionName
    config: OptionConfig = Field(default_factory=OptionConfig)
    summary: Summary = Field(default="", description="shown beside the name")

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that were sent."""
        return self.config.model_dump(mode="json", exclude_unset=True)


class ResumeRequest(JsonBody):
    """Options for resuming a job."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"epochs": 100}]})

    epochs: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="train up to this epoch; β and the learning rate then follow the longer "
        "schedule. A succeeded job needs it.",
    )


class JobChange(JsonBody):
    """The part of a job that can be changed in any status."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"is_pinned": True}]})

    is_pinned: bool = Field(description="whether its checkpoints stay when space is needed")
