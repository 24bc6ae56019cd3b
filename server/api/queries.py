"""Query parameters: labels to filter by and jobs to compare; unknown parameters are refused."""

import re
from functools import partial
from typing import Annotated, Any, Final, NoReturn

from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from pydantic import Field, TypeAdapter, ValidationError
from sqlmodel import Session

from server.api.requests import Labels
from server.jobs.listing import find_group, find_jobs, find_newest_succeeded
from server.jobs.options import check_known
from server.judging.comparisons import MAX_COMPARED_JOBS, Comparison, compare
from server.judging.criteria import CriteriaSet, Thresholds
from server.models.options import NAME_PATTERN

#: The largest page of any list.
MAX_PAGE_SIZE: Final = 100

_LABELS: Final = TypeAdapter(Labels)
_LABEL_PARAMETER: Final = re.compile(r"metadata\[(.*)\]", re.DOTALL)
_OPTION: Final = NAME_PATTERN.strip("^$")
#: Enough for twenty of the longest names.
_MAX_OPTIONS_LENGTH: Final = 1300
# Only for the API's description; `check_known` says which name is wrong.
_OPTIONS_PATTERN: Final = rf"^( *{_OPTION} *(, *{_OPTION} *)*)?$"


def get_labels(request: Request) -> dict[str, str]:
    """The labels to filter by. FastAPI itself cannot read a `deepObject` parameter."""
    labels: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name != "metadata" and not name.startswith("metadata["):
            continue
        match = _LABEL_PARAMETER.fullmatch(name)
        if match is None or match[1] in labels:
            refuse_query(name, "give a label once, as metadata[key]=value")
        labels[match[1]] = value
    try:
        return _LABELS.validate_python(labels)
    except ValidationError as error:
        errors = [each | {"loc": ("query", "metadata", *each["loc"])} for each in error.errors()]
        raise RequestValidationError(errors) from None


LabelsDep = Annotated[dict[str, str], Depends(get_labels)]

#: The parameter that `get_labels` reads, for the API's description.
LABELS_PARAMETER: Final[dict[str, Any]] = {
    "name": "metadata",
    "in": "query",
    "style": "deepObject",
    "explode": True,
    "description": "labels that the jobs must have, as `metadata[study]=x`; several are combined "
    "by and",
    "schema": _LABELS.json_schema(),
}


def refuse_unknown_parameters(request: Request) -> None:
    """Answer 422 for an unknown parameter: a misspelt filter would otherwise filter nothing."""
    route = request.scope["route"]
    known = {field.alias for field in route.dependant.query_params}
    has_labels = any(each.call is get_labels for each in route.dependant.dependencies)
    for name in request.query_params:
        is_label = has_labels and (name == "metadata" or name.startswith("metadata["))
        if name not in known and not is_label:
            allowed = ", ".join([*sorted(known), *(["metadata[key]"] if has_labels else [])])
            refuse_query(name, f"unknown parameter; known are {allowed}")


def refuse_query(name: str, message: str) -> NoReturn:
    """Answer 422 for a query parameter."""
    error: dict[str, Any] = {"type": "value_error", "loc": ("query", name), "msg": message}
    raise RequestValidationError([error])


class JudgingQuery(Thresholds):
    """The criteria to judge by, and thresholds to override."""

    criteria: CriteriaSet = Field(
        default=CriteriaSet.spec, description="the set of criteria to judge by"
    )

    def thresholds(self) -> Thresholds:
        return Thresholds.model_validate(self.model_dump(include=set(Thresholds.model_fields)))


class ComparisonQuery(JudgingQuery):
    """The jobs to compare, by id or by option, and how to judge them."""

    job_id: list[str] = Field(default_factory=list, max_length=MAX_COMPARED_JOBS)
    options: str = Field(
        default="",
        max_length=_MAX_OPTIONS_LENGTH,
        description="`a,b,c` takes the newest succeeded job of each, and all jobs of its "
        "configuration as a group",
        examples=["a,b,c"],
        json_schema_extra={"pattern": _OPTIONS_PATTERN},
    )

    def compare(self, session: Session, *, has_curves: bool = False) -> Comparison:
        """The requested comparison. Raises RequestValidationError and NotFoundError."""
        compare_by = partial(
            compare,
            thresholds=self.thresholds(),
            criteria_set=self.criteria,
            has_curves=has_curves,
        )
        if bool(self.job_id) == bool(self.options):
            refuse_query("job_id", "name jobs by job_id, or presets by options=a,b,c, but not both")
        if self.job_id:
            jobs = find_jobs(session, self.job_id)
            return compare_by(session, jobs)
        names = _parse_options(self.options)
        for name in names:
            check_known(session, name, field="options")
        jobs = [find_newest_succeeded(session, name) for name in names]
        # Options of one configuration are one group.
        leaders = {job.config_sha256: job for job in reversed(jobs)}
        groups = [find_group(session, job) for job in reversed(leaders.values())]
        return compare_by(session, jobs, groups=groups)


def _parse_options(options: str) -> list[str]:
    names = dict.fromkeys(name.strip() for name in options.split(",")) if options else {}
    if len(names) > MAX_COMPARED_JOBS:
        refuse_query("options", f"at most {MAX_COMPARED_JOBS} options can be compared")
    return list(names)
