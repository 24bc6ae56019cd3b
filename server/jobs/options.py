"""Options: the built-in ones and those that users added.

An option never changes: a name that jobs and studies refer to keeps its meaning.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from sqlalchemy import Engine, func, select
from sqlmodel import Session, col

from server.database.engine import write_transaction
from server.errors import ConflictError, InvalidInputError, NotFoundError
from server.models.options import OPTIONS, BuiltInOption
from server.models.tables import Job, OwnOption, Study

#: Further names are left out of an error message.
_MAX_NAMES_SHOWN: Final = 20


class OptionNotFoundError(NotFoundError):
    """No option has this name."""


class OptionConflictError(ConflictError):
    """An option cannot be changed or deleted now."""


class UnknownOptionError(InvalidInputError):
    """A request names an option that does not exist."""

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message)
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
    """All options by name: the built-in ones first, then the others by name."""
    rows = session.scalars(select(OwnOption).order_by(col(OwnOption.name)))
    return BUILT_IN_OPTIONS | {row.name: Option.of_row(row) for row in rows}


def find_option(session: Session, name: str) -> Option:
    """Raises OptionNotFoundError."""
    option = _find(session, name)
    if option is None:
        raise OptionNotFoundError(f"there is no option {name!r}; GET /options lists all options")
    return option


def choose_option(session: Session, name: str, *, field: str = "option") -> Option:
    """The option that a request's field names. Raises UnknownOptionError."""
    option = _find(session, name)
    if option is None:
        allowed = list(read_options(session))
        shown = ", ".join(allowed[:_MAX_NAMES_SHOWN]) + ", …" * (len(allowed) > _MAX_NAMES_SHOWN)
        message = f"there is no option {name!r}; allowed are {shown}. PUT /options/{name} adds it"
        raise UnknownOptionError(message, field=field)
    return option


def check_filter(session: Session, name: str) -> None:
    """Raise UnknownOptionError if neither an option nor a job has this name: a misspelt filter
    would list nothing. The jobs of a deleted option can still be found."""
    of_option = select(col(Job.id)).where(col(Job.option) == name).limit(1)
    if _find(session, name) is None and session.scalars(of_option).first() is None:
        choose_option(session, name)


def count_jobs(session: Session) -> dict[str, int]:
    """The number of jobs of each option that has any."""
    counts = select(col(Job.option), func.count()).group_by(col(Job.option))
    return {row[0]: row[1] for row in session.execute(counts)}


def add_option(engine: Engine, row: OwnOption) -> bool:
    """Store an option; returns False if it is stored already. Raises OptionConflictError.

    Only the summary of a stored option can be replaced: it has no effect on a job.
    """
    if row.name in BUILT_IN_OPTIONS:
        raise OptionConflictError(f"option {row.name} is built in; use another name")
    with write_transaction(engine) as session:
        stored = session.get(OwnOption, row.name, with_for_update=True)
        if stored is None:
            session.add(row)
            return True
        if stored.preset != row.preset:
            raise OptionConflictError(
                f"there is another option {row.name!r} with other settings, and an option never "
                "changes; use another name, or delete it first"
            )
        stored.summary = row.summary
    return False


def delete_option(engine: Engine, name: str) -> None:
    """Delete an option that no study and no other option names.

    Jobs keep their option's name and their whole configuration. Raises OptionNotFoundError and
    OptionConflictError.
    """
    if name in BUILT_IN_OPTIONS:
        raise OptionConflictError(f"option {name} is built in")
    with write_transaction(engine) as session:
        row = session.get(OwnOption, name, with_for_update=True)
        if row is None:
            raise OptionNotFoundError(f"there is no option {name!r}")
        if user := _find_user(session, name):
            raise OptionConflictError(f"{user} names the option {name!r}; delete it first")
        session.delete(row)


def _find(session: Session, name: str) -> Option | None:
    if name in BUILT_IN_OPTIONS:
        return BUILT_IN_OPTIONS[name]
    # PostgreSQL refuses a text with a NUL; no option's name has one.
    row = session.get(OwnOption, name) if "\0" not in name else None
    return None if row is None else Option.of_row(row)


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
