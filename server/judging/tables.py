"""A study as tables for other programs: CSV (RFC 4180) with one row per job, or per epoch.

A text that a spreadsheet would take for a formula gets an apostrophe in front (OWASP, "CSV
injection"). Numbers stay numbers.
"""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import Engine, String, cast, select
from sqlmodel import Session, col

from server.judging.criteria import CriteriaSet, list_criteria
from server.judging.facts import JobFacts
from server.judging.groups import GroupMetric, SeedResult
from server.judging.studies import ArmVerdict, StudyVerdict
from server.models.columns import FiniteJSON, count_seconds
from server.models.configuration import NUM_COLOURS
from server.models.epochs import EpochMetrics
from server.models.studies import Arm, Study, StudyJob

#: What makes a spreadsheet compute a cell; some also take the wide forms.
_FORMULA_MARKS: Final = tuple("=+-@\t\r\n＝＋－＠")
#: Jobs whose epochs are read in one query. With a thousand epochs each they need some 20 MB.
_JOBS_PER_QUERY: Final = 10
_EPOCH_COLUMNS: Final = [
    column
    for column in EpochMetrics.__table__.columns  # type: ignore[attr-defined]
    if column.name != "job_id"
]
_LISTS: Final = [column.name for column in _EPOCH_COLUMNS if isinstance(column.type, FiniteJSON)]

#: What a row says of the program that trained the job.
_PROVENANCE: Final = (
    *("losslab_version", "revision", "is_changed", "source_sha256"),
    *("torch_version", "number_format", "host"),
)

Row = Iterable[object]


def write_jobs(study: Study, verdict: StudyVerdict, facts: Mapping[str, JobFacts]) -> Iterator[str]:
    """One row per arm and seed, in this order; the first is the heading."""
    rows = (
        _describe_job(
            study,
            arm,
            result,
            criteria_set=verdict.criteria_set,
            facts=facts.get(result.job_id or ""),
        )
        for arm, results in zip(verdict.arms, verdict.results, strict=True)
        for result in results
    )
    yield _encode([_name_job_columns(verdict.criteria_set)])
    yield _encode(map(_escape_row, rows))


def write_epochs(engine: Engine, study: Study) -> Iterator[str]:
    """One row per arm, seed and epoch, in this order; the first is the heading.

    A long table is never held as a whole. Each part is read in a session of its own, so that a
    slow reader holds no connection. Raises StoredStudyError before the first part.
    """
    arms = study.arm_list
    return _write_epochs(engine, study, arms=[arm.name for arm in arms], widths=_find_widths(arms))


def _write_epochs(
    engine: Engine, study: Study, *, arms: Sequence[str], widths: Mapping[str, int]
) -> Iterator[str]:
    yield _encode([["arm", "seed", "job_id", *_name_epoch_columns(widths)]])
    links = _read_links(engine, study)
    for first in range(0, len(links), _JOBS_PER_QUERY):
        part = links[first : first + _JOBS_PER_QUERY]
        epochs = _read_epochs(engine, [job_id for _, _, job_id in part], widths=widths)
        yield _encode(
            [_escape(arms[arm]), seed, job_id, *cells]
            for arm, seed, job_id in part
            if arm < len(arms)
            for cells in epochs[job_id]
        )


def guard_text(text: str) -> str:
    """The text with an apostrophe if a spreadsheet would compute it."""
    return f"'{text}" if text.startswith(_FORMULA_MARKS) else text


def _name_job_columns(criteria_set: CriteriaSet) -> list[str]:
    """The criteria are those of the set that judges the study."""
    return [
        *("study", "study_name", "arm", "option", "seed", "data_seed", "job_id", "is_reused"),
        *("status", "has_passed", "diagnosis"),
        *list_criteria(criteria_set),
        *GroupMetric,
        *("epochs", "config_sha256", "started_at", "ended_at", "seconds"),
        *("device", *_PROVENANCE),
    ]


def _describe_job(
    study: Study,
    arm: ArmVerdict,
    result: SeedResult,
    *,
    criteria_set: CriteriaSet,
    facts: JobFacts | None,
) -> Row:
    seconds = count_seconds(result.started_at, result.ended_at)
    made_by = facts.provenance if facts else None
    return [
        *(study.id, study.name, arm.arm, arm.option, result.seed),
        *(facts.data_seed if facts else None, result.job_id, result.is_reused, result.status),
        *(result.has_passed if result.is_judged else None, result.diagnosis),
        *(result.criteria.get(name) for name in list_criteria(criteria_set)),
        *(result.metrics.get(name) for name in GroupMetric),
        *(facts.epochs_completed if facts else None, arm.config_sha256),
        *(result.started_at, result.ended_at, seconds),
        facts.device if facts else None,
        *(getattr(made_by, name, None) for name in _PROVENANCE),
    ]


def _encode(rows: Iterable[Row]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer).writerows(rows)
    return buffer.getvalue()


def _escape_row(row: Row) -> list[object]:
    return [_escape(value) for value in row]


def _escape(value: object) -> object:
    """The value as the table has it; numbers are left to the writer."""
    match value:
        case bool():
            return str(value).lower()
        case str():
            return guard_text(value)
        case datetime():
            return _show_time(value)
        case _:
            return value


def _show_time(moment: datetime) -> str:
    """All with the same digits, so that a column of times has one format."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds")


# -- epochs


def _find_widths(arms: Sequence[Arm]) -> dict[str, int]:
    """The number of values in each column of lists: that of the arm with the most."""
    num_dimensions = max(arm.training_config.latent_dim for arm in arms)
    return {
        name: NUM_COLOURS if name.endswith("_per_colour") else num_dimensions for name in _LISTS
    }


def _name_epoch_columns(widths: Mapping[str, int]) -> Iterator[str]:
    """`val_kl_per_dimension` becomes `val_kl_0`, `val_kl_1` and so on."""
    for column in _EPOCH_COLUMNS:
        if column.name in widths:
            stem = column.name.rpartition("_per_")[0]
            yield from (f"{stem}_{number}" for number in range(widths[column.name]))
        else:
            yield column.name


def _read_links(engine: Engine, study: Study) -> list[tuple[int, int, str]]:
    """Arm, seed and job of each row of the study that has a job."""
    arm, job_id = col(StudyJob.arm), col(StudyJob.job_id)
    rows = select(arm, col(StudyJob.seed), job_id).where(
        col(StudyJob.study_id) == study.id, job_id.is_not(None)
    )
    with Session(engine) as session:
        found = session.execute(rows.order_by(arm, col(StudyJob.position)))
        return [(arm, seed, job_id) for arm, seed, job_id in found if job_id is not None]


def _read_epochs(
    engine: Engine, job_ids: Sequence[str], *, widths: Mapping[str, int]
) -> dict[str, list[list[Any]]]:
    """The cells of each epoch by job, oldest first."""
    columns = [
        cast(column, String) if column.name in widths else column for column in _EPOCH_COLUMNS
    ]
    job_id, epoch = col(EpochMetrics.job_id), col(EpochMetrics.epoch)
    rows = select(job_id, *columns).where(job_id.in_(job_ids)).order_by(job_id, epoch)
    with Session(engine) as session:
        found = session.execute(rows).all()
    epochs: dict[str, list[list[Any]]] = {job_id: [] for job_id in job_ids}
    for owner, *values in found:
        epochs[owner].append(_spread(values, widths=widths))
    return epochs


def _spread(values: Sequence[Any], *, widths: Mapping[str, int]) -> list[Any]:
    """An epoch's cells, with each list in cells of its own."""
    cells: list[Any] = []
    for column, value in zip(_EPOCH_COLUMNS, values, strict=True):
        if column.name in widths:
            cells += _split(value, width=widths[column.name])
        else:
            cells.append(_show_time(value) if isinstance(value, datetime) else value)
    return cells


def _split(numbers: str | None, *, width: int) -> list[str]:
    """The cells of a list of numbers, which is read as the text of its JSON: to parse numbers only
    to write them again would take most of the time. Epochs of older versions have none."""
    is_empty = numbers in (None, "null", "[]")
    texts = [] if is_empty or numbers is None else numbers.strip("[]").replace(" ", "").split(",")
    cells = ["" if text == "null" else text for text in texts]
    return cells + [""] * (width - len(cells))
