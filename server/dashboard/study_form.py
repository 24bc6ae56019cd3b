"""The form for a new study: its fields, the input, and the resulting plan."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError
from sqlmodel import Session

from server.api.problems import explain_errors
from server.api.requests import FORM
from server.api.study_requests import DEFAULT_MAX_SEEDS, DEFAULT_NUM_SEEDS, StudyRequest
from server.dashboard.job_form import OVERRIDES, Override
from server.errors import InvalidInputError
from server.models.configuration import NOT_IDENTITY
from server.models.options import BuiltInOption
from server.models.studies import Study

NUM_GRID_ROWS: Final = 3
_COMMON: Final = ("dataset", "num_samples", "epochs", "batch_size")
#: Settings of all arms that the form has; the others are settings of options.
SETTINGS: Final = [each for each in OVERRIDES if each.name in _COMMON]
#: Settings that a row of the grid can vary.
GRID_KEYS: Final = [each.name for each in OVERRIDES if each.name not in NOT_IDENTITY]
_RACE_FIELD: Final = "until_decided"

Fields = Iterable[tuple[str, str]]


@dataclass(slots=True)
class StudyForm:
    """The form's input and its result: a request with its study, or an error for each field."""

    values: dict[str, str]
    options: list[str]
    request: StudyRequest | None = None
    study: Study | None = None
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def is_race(self) -> bool:
        return self.values.get(_RACE_FIELD) == "true"

    def list_errors(self, *names: str) -> list[str]:
        """The errors of a field and of its parts: `options` also has those of `options.0`."""
        return [
            message
            for found, message in self.errors.items()
            if any(found == name or found.startswith(f"{name}.") for name in names)
        ]

    def grid_errors(self, row: int) -> list[str]:
        key = self.values.get(f"grid_key_{row}")
        return self.list_errors(f"grid_{row}", *([f"grid.{key}"] if key else []))

    @property
    def settings(self) -> list[Override]:
        return SETTINGS


def fill_study_form(sent: Fields, session: Session, *, datasets_dir: Path) -> StudyForm:
    """Validate the input; a form that was just opened has the three built-in options."""
    fields = [(name, value.strip()) for name, value in sent]
    values = {name: value for name, value in fields if name != "options" and value}
    options = [value for name, value in fields if name == "options"]
    if not fields:
        options = list(BuiltInOption)
    form = StudyForm(values, options)
    if not options:
        form.errors["options"] = "choose at least one option"
    body = _make_body(form)
    if form.errors:
        return form
    try:
        form.request = StudyRequest.model_validate(body, context=FORM)
        form.study = form.request.make_study(session, datasets_dir=datasets_dir)
    except ValidationError as error:
        found = {entry.field: entry.message for entry in explain_errors(error.errors())}
        form.errors = _rename(found)
    except InvalidInputError as error:
        form.errors = _rename({error.field or "study": str(error)})
    return form


def _make_body(form: StudyForm) -> dict[str, Any]:
    """The body of a request to the API; what a hidden or unused field has is left out."""
    values = form.values
    body: dict[str, Any] = {"options": form.options, "grid": _read_grid(form)}
    body |= {name: values[name] for name in ("name", "quick_test", "reuse") if name in values}
    if form.is_race:
        body |= {_RACE_FIELD: True, "max_seeds": values.get("max_seeds", DEFAULT_MAX_SEEDS)}
    else:
        body["num_seeds"] = values.get("num_seeds", DEFAULT_NUM_SEEDS)
    body["config"] = {name: values[name] for name in _COMMON if name in values}
    return body


def _read_grid(form: StudyForm) -> dict[str, list[Any]]:
    """The rows of the grid; a row without a setting or without values is an error."""
    grid: dict[str, list[Any]] = {}
    for row in range(1, NUM_GRID_ROWS + 1):
        key, text = form.values.get(f"grid_key_{row}"), form.values.get(f"grid_values_{row}", "")
        given = [_read_value(value.strip()) for value in text.split(",") if value.strip()]
        if key is None and not given:
            continue
        if key is None or not given:
            missing = "choose a setting for these values" if given else "needs at least one value"
            form.errors[f"grid_{row}"] = missing
        elif key in grid:
            form.errors[f"grid_{row}"] = "this setting is in a row above already"
        else:
            grid[key] = given
    return grid


def _read_value(text: str) -> bool | int | float | str:
    """A number, `true` or `false`, or else the text itself."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except ValueError:
        return text
    return value if isinstance(value, bool | int | float) else text


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _rename(errors: Mapping[str, str]) -> dict[str, str]:
    """Errors of settings under the names of the form's fields."""
    return {
        name.removeprefix("config.") if name.startswith("config.") else name: message
        for name, message in errors.items()
    }
