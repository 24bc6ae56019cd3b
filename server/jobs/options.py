"""Options: the built-in ones and those that users added.

An option never changes: a name that jobs and studies refer to keeps its meaning.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from sqlalchemy import Engine, func, select
from sqlalchemy.exc import IntegrityError
from sqlmodel import Session, col

from server.database.engine import take_turn, write_transaction
from server.errors import ConflictError, InvalidInputError, NotFoundError
from server.models.configuration import resolve_config
from server.models.names import is_name
from server.models.options import OPTIONS, BuiltInOption
from server.models.studies import Study
from server.models.tables import Job, OwnOption
from server.texts import list_some

#: So many can still be read in one list, and chosen from in a form.
MAX_OWN_OPTIONS: Final = 200

#: Further names are left out of an error message, and the rest of a long one.
_MAX_LENGTH_SHOWN: Final = 64


class OptionNotFoundError(NotFoundError):
    """No option has this name."""


class OptionConflictError(ConflictError):
    """An option cannot be changed or deleted now."""


class UnknownOptionError(InvalidInputError):
    """A request names an option that does not exist."""

    def __init__(self, name: str, *, allowed: Iterable[str], field: str) -> None:
        super().__init__(_describe_unknown(name, allowed=list(allowed)))
        self.field = field


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A loss configuration to compare: a name for a set of settings."""

    name: str
    preset: Mapping[str, Any]  #: the settings that differ from the defaults
    summary: str
    base: str | None = None  #: the option from which it was derived
    config: Mapping[str, Any]  #: the settings that differ from the base

    @property
    def is_built_in(self) -> bool:
        return self.base is None

    @classmethod
    def of_built_in(cls, name: BuiltInOption) -> Self:
        preset = OPTIONS[name]
        return cls(
            name=name.value, preset=preset.config, config=preset.config, summary=preset.summary
        )

    @classmethod
    def of_row(cls, row: OwnOption) -> Self:
        return cls(
            name=row.name, preset=row.preset, summary=row.summary, base=row.base, config=row.config
        )


BUILT_IN_OPTIONS: Final = {name.value: Option.of_built_in(name) for name in BuiltInOption}


def read_options(session: Session) -> dict[str, Option]:
    """All options by name: the built-in ones first, then the others in order."""
    # Databases differ in the order of texts.
    rows = sorted(session.scalars(select(OwnOption)), key=lambda row: row.name)
    return BUILT_IN_OPTIONS | {row.name: Option.of_row(row) for row in rows}


def find_option(session: Session, name: str) -> Option:
    """Raises OptionNotFoundError."""
    option = _find(session, name)
    if option is None:
        raise OptionNotFoundError(_describe_missing(name))
    return option


def choose_option(session: Session, name: str, *, field: str = "option") -> Option:
    """The option that a request's field names. Raises UnknownOptionError."""
    option = _find(session, name)
    if option is None:
        raise UnknownOptionError(name, allowed=read_options(session), field=field)
    return option


def is_known(session: Session, name: str) -> bool:
    """Whether an option or a job has this name. A job keeps it when its option is deleted."""
    if _find(session, name) is not None:
        return True
    jobs = select(col(Job.id)).where(col(Job.option) == name)
    return is_name(name) and session.scalars(jobs.limit(1)).first() is not None


def check_known(session: Session, name: str, *, field: str = "option") -> None:
    """Raise UnknownOptionError for a name that no option and no job has: a misspelt filter would
    find nothing."""
    if not is_known(session, name):
        raise UnknownOptionError(name, allowed=read_options(session), field=field)


def count_jobs(session: Session) -> dict[str, int]:
    """The number of jobs of each option that has any."""
    counts = select(col(Job.option), func.count()).group_by(col(Job.option))
    return {row[0]: row[1] for row in session.execute(counts)}


def count_jobs_of(session: Session, name: str) -> int:
    jobs = select(func.count()).select_from(Job).where(col(Job.option) == name)
    num_jobs: int = session.scalars(jobs).one()
    return num_jobs


def add_option(
    engine: Engine, name: str, *, base: str, config: Mapping[str, Any], summary: str
) -> bool:
    """Store an option; returns False if it is stored already.

    Only the summary of a stored option can be replaced: it has no effect on a job. Raises
    UnknownOptionError if the base does not exist, and OptionConflictError.
    """
    if name in BUILT_IN_OPTIONS:
        raise OptionConflictError(f"option {name} is built in; use another name")
    try:
        return _store(engine, name, base=base, config=config, summary=summary)
    except IntegrityError:
        # The same name arrived twice at the same time, and the other one was stored first.
        return _store(engine, name, base=base, config=config, summary=summary)


def delete_option(engine: Engine, name: str) -> None:
    """Delete an option that no study and no other option names.

    Jobs keep their option's name and their whole configuration. Raises OptionNotFoundError and
    OptionConflictError.
    """
    if name in BUILT_IN_OPTIONS:
        raise OptionConflictError(f"option {name} is built in")
    with write_transaction(engine) as session:
        row = _read_row(session, name, with_for_update=True)
        if row is None:
            raise OptionNotFoundError(_describe_missing(name))
        if user := _find_user(session, name):
            raise OptionConflictError(f"{user} names the option {name!r}; delete it first")
        session.delete(row)


def _store(
    engine: Engine, name: str, *, base: str, config: Mapping[str, Any], summary: str
) -> bool:
    with write_transaction(engine) as session:
        preset = {**_lock_base(session, base).preset, **config}
        wanted = resolve_config(preset)
        stored = _read_row(session, name, with_for_update=True)
        if stored is None:
            _check_number(session)
            row = OwnOption(
                name=name, base=base, config=dict(config), preset=preset, summary=summary
            )
            session.add(row)
            return True
        if resolve_config(stored.preset) != wanted:
            raise OptionConflictError(
                f"there is another option {name!r} with other settings, and an option never "
                "changes; use another name, or delete it first"
            )
        stored.summary = summary or stored.summary
    return False


def _lock_base(session: Session, name: str) -> Option:
    """The base of a new option, which nobody can delete meanwhile."""
    _read_row(session, name, with_for_update={"read": True})
    return choose_option(session, name, field="base")


def _check_number(session: Session) -> None:
    take_turn(session)  # two at the same time cannot both be the last one that is allowed
    if session.scalars(select(func.count()).select_from(OwnOption)).one() >= MAX_OWN_OPTIONS:
        raise OptionConflictError(
            f"there are {MAX_OWN_OPTIONS} own options already; delete one that you no longer need"
        )


def _find(session: Session, name: str) -> Option | None:
    if name in BUILT_IN_OPTIONS:
        return BUILT_IN_OPTIONS[name]
    row = _read_row(session, name)
    return None if row is None else Option.of_row(row)


def _read_row(session: Session, name: str, **arguments: Any) -> OwnOption | None:
    return session.get(OwnOption, name, **arguments) if is_name(name) else None


def _describe_missing(name: str) -> str:
    return f"there is no option {name[:_MAX_LENGTH_SHOWN]!r}; GET /options lists all options"


def _describe_unknown(name: str, *, allowed: list[str]) -> str:
    message = f"there is no option {name[:_MAX_LENGTH_SHOWN]!r}; allowed are {list_some(allowed)}"
    return f"{message}. PUT /options/{name} adds it" if is_name(name) else message


def _find_user(session: Session, name: str) -> str | None:
    """What names the option: `study 3f2a9c51d07e` or `option b_soft`."""
    derived = select(col(OwnOption.name)).where(col(OwnOption.base) == name)
    if other := session.scalars(derived.limit(1)).first():
        return f"option {other}"
    studies = select(col(Study.id), col(Study.arms))
    for study_id, arms in session.execute(studies):
        if any(arm["option"] == name for arm in arms):
            return f"study {study_id}"
    return None
