"""Column types that several tables share, for both SQLite and PostgreSQL."""

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from enum import StrEnum
from functools import cache
from typing import Any, Final, get_origin

from pydantic import TypeAdapter, ValidationError
from sqlalchemy import (
    JSON,
    CheckConstraint,
    Column,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    String,
    TypeDecorator,
)
from sqlalchemy.sql.operators import OperatorType
from sqlalchemy.types import TypeEngine
from sqlmodel import SQLModel

from server.finite import make_finite

_logger = logging.getLogger(__name__)
#: The key of what is stored in place of settings and is none.
UNREADABLE: Final = "unreadable"


class UTCDateTime(TypeDecorator[datetime]):
    """Time-zone aware UTC on both databases; SQLite itself stores no time zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        return value.astimezone(UTC) if value else None

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        return value.replace(tzinfo=UTC) if value and value.tzinfo is None else value


class FiniteFloat(TypeDecorator[float]):
    """A number. One that is not finite is stored as null, on both databases alike."""

    impl = Float
    cache_ok = True

    def process_bind_param(self, value: float | None, dialect: Dialect) -> float | None:  # noqa: ARG002
        finite: float | None = make_finite(value)
        return finite


class FiniteJSON(TypeDecorator[Any]):
    """JSON of one shape, such as `list[StrictInt]`. A number that is not finite is null.

    Another version may have stored another shape, and a row that cannot be read would take down
    every list that it is in. So anything else is read as the empty value of the shape: null where
    the shape allows it. Only settings are never read as none, since then a job would be trained
    with the defaults: with `keeps_unreadable` they are read as `{"unreadable": ...}`.
    """

    impl = JSON
    cache_ok = True
    # As the type itself does: None is the JSON value null.
    should_evaluate_none = True

    def __init__(self, shape: Any = Any, *, keeps_unreadable: bool = False) -> None:
        super().__init__()
        self.shape = shape
        self.keeps_unreadable = keeps_unreadable

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:  # noqa: ARG002
        return make_finite(value)

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any]:
        """Checks what is read; also what the database holds that is no JSON at all."""
        decode = self.impl_instance.result_processor(dialect, coltype) or _keep

        # PostgreSQL gives the JSON null as None, and so SQL's null.
        def read(stored: Any) -> Any:
            try:
                value = make_finite(decode(stored))
                _make_adapter(self.shape).validate_python(value)
            except ValidationError:
                return self._read_unreadable(value)
            except (ValueError, TypeError, RecursionError):
                return self._read_unreadable(str(stored))
            return value

        return read

    def _read_unreadable(self, value: Any) -> Any:
        if value is not None:  # as a row that an outer join did not find
            _warn(str(self.shape))
        if self.keeps_unreadable:
            return {UNREADABLE: value}
        empty = get_origin(self.shape)
        return empty() if empty in (dict, list) else None

    def coerce_compared_value(self, op: OperatorType | None, value: Any) -> TypeEngine[Any]:
        return self.impl_instance.coerce_compared_value(op, value)


def _keep(value: Any) -> Any:
    return value


@cache
def _make_adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


@cache
def _warn(shape: str) -> None:
    """Once for each shape: an open page reads its rows every few seconds."""
    _logger.warning(
        "the database has values that this version cannot read as %s; another version may have "
        "stored them, and they are shown as if there were none",
        shape,
    )


class EnumText(TypeDecorator[StrEnum]):
    """Members of an enum as text.

    A word of a later version is read as a member that the enum does not list: it has its value
    and properties, and can be compared, shown and stored again.
    """

    impl = String
    cache_ok = True

    def __init__(self, values: type[StrEnum], *, length: int | None = None) -> None:
        super().__init__(length)
        self.values = values

    def process_bind_param(self, value: StrEnum | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        return None if value is None else str(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> StrEnum | None:  # noqa: ARG002
        if value is None:
            return None
        try:
            return self.values(value)
        except ValueError:
            return _make_member(self.values, value)


def _make_member(values: type[StrEnum], word: str) -> StrEnum:
    """A member beside those listed, as `enum.Flag` makes them for combinations."""
    member = str.__new__(values, word)
    member._name_ = member._value_ = word
    return member


def store_finite_numbers(*tables: type[SQLModel]) -> None:
    """Make `FiniteFloat` of each column of numbers."""
    for table in tables:
        for column in table.metadata.tables[str(table.__tablename__)].columns:
            if isinstance(column.type, Float):
                column.type = FiniteFloat()


def utc_now() -> datetime:
    return datetime.now(UTC)


def count_seconds(begin: datetime | None, end: datetime | None) -> float | None:
    """The seconds between two stored times; None if one is missing, or if the clock was set back
    between them."""
    if begin is None or end is None or end < begin:
        return None
    return (end - begin).total_seconds()


def open_text_column(values: type[StrEnum], *, length: int | None = None) -> Any:
    """Text without a CHECK for an enum that grows: it gets new members without a migration."""
    return Column(EnumText(values, length=length), nullable=False)


def text_column(name: str, values: type[StrEnum], *, nullable: bool = False) -> Any:
    """Text with a CHECK. A native enum type could never drop a value in a migration."""
    allowed = ", ".join(f"'{value}'" for value in values)
    check = CheckConstraint(f"{name} IN ({allowed})")
    return Column(EnumText(values, length=20), check, nullable=nullable)


def json_type(shape: Any, *, keeps_unreadable: bool = False) -> Any:
    """The `sa_type` of a column of JSON; see `FiniteJSON`."""
    return FiniteJSON(shape, keeps_unreadable=keeps_unreadable)


def labels_column() -> Any:
    return Column("metadata", FiniteJSON(dict[str, str]), nullable=False)


def job_id_column(*, primary_key: bool = False, index: bool | None = None) -> Any:
    key = ForeignKey("job.id", ondelete="CASCADE")
    return Column(String(12), key, primary_key=primary_key, index=index, nullable=False)


def study_id_column(*, primary_key: bool = False) -> Any:
    key = ForeignKey("study.id", ondelete="CASCADE")
    return Column(String(12), key, primary_key=primary_key, nullable=False)
