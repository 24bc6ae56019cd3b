"""The form for a new job: its fields, the input, and the resulting configuration."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import NoneType
from typing import Any, get_args

from pydantic import ValidationError

from server.api.problems import explain_errors
from server.api.requests import FORM, JobRequest
from server.jobs.options import Option, UnknownOptionError
from server.models.configuration import TrainingConfig
from server.models.options import BuiltInOption

_SCHEMA = TrainingConfig.model_json_schema()["properties"]
_OWN_FIELDS = ("option", "quick_test", "name", "priority")


@dataclass(frozen=True, slots=True)
class Override:
    """A setting that can be changed in the form."""

    name: str
    kind: str  # number, text or choice
    description: str
    choices: tuple[str, ...] = ()
    is_whole: bool = False
    minimum: float | None = None
    maximum: float | None = None


@dataclass(slots=True)
class JobForm:
    """The form's input and its result: a request, or an error for each invalid field."""

    values: dict[str, str]
    request: JobRequest | None = None
    config: TrainingConfig | None = None
    changed: frozenset[str] = frozenset()
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def is_overriding(self) -> bool:
        return bool(self.values.keys() - set(_OWN_FIELDS)) or bool(self.errors)


def fill_form(sent: Mapping[str, str], *, options: Mapping[str, Option]) -> JobForm:
    """Validate the input; an empty field takes the option's value."""
    allowed = {*_OWN_FIELDS, *TrainingConfig.model_fields}
    typed = {key: value.strip() for key, value in sent.items()}
    values = {"option": BuiltInOption.b.value} | {
        key: value for key, value in typed.items() if key in allowed and value
    }
    form = JobForm(values)
    try:
        form.request = JobRequest.model_validate(values, context=FORM)
        option = options.get(form.request.option)
        if option is None:
            unknown = UnknownOptionError(form.request.option, allowed=options, field="option")
            form.errors = {"option": str(unknown)}
            return form
        form.config = form.request.resolve_config(option.preset)
    except ValidationError as error:
        form.errors = {entry.field: entry.message for entry in explain_errors(error.errors())}
        return form
    form.changed = frozenset(form.request.model_fields_set & TrainingConfig.model_fields.keys())
    return form


def _describe(name: str) -> Override:
    annotation, schema = TrainingConfig.model_fields[name].annotation, _SCHEMA[name]
    description: str = schema.get("description", "")
    if annotation is bool:
        return Override(name, "choice", description, choices=("true", "false"))
    if isinstance(annotation, type) and issubclass(annotation, StrEnum):
        return Override(name, "choice", description, choices=tuple(annotation))
    if NoneType in get_args(annotation):
        # The form has no way to say null: a field that is left empty has the default.
        annotation, schema = get_args(annotation)[0], schema["anyOf"][0]
    if annotation in (int, float):
        lowest: Any = schema.get("minimum", schema.get("exclusiveMinimum"))
        highest: Any = schema.get("maximum", schema.get("exclusiveMaximum"))
        return Override(
            name,
            "number",
            description,
            is_whole=annotation is int,
            minimum=lowest,
            maximum=highest,
        )
    return Override(name, "text", description)


OVERRIDES = [_describe(name) for name in TrainingConfig.model_fields]
