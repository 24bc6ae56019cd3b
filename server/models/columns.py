"""Column types that several tables share, for both SQLite and PostgreSQL."""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, cast

from sqlalchemy import (
    JSON,
    Column,
    DateTime,
    Dialect,
    Enum,
    Float,
    ForeignKey,
    String,
    TypeDecorator,
)
from sqlalchemy.sql.operators import OperatorType
from sqlalchemy.types import TypeEngine
from sqlmodel import SQLModel

from server.finite import make_finite


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
    """JSON in which each number that is not finite is stored as null."""

    impl = JSON
    cache_ok = True
    # As the type itself does: None is the JSON value null.
    should_evaluate_none = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:  # noqa: ARG002
        return make_finite(value)

    def coerce_compared_value(self, op: OperatorType | None, value: Any) -> TypeEngine[Any]:
        return self.impl_instance.coerce_compared_value(op, value)


class EnumText(TypeDecorator[StrEnum]):
    """Members of an enum as text without a CHECK: it gets new members without a migration."""

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
            # A member of a later version. Members are text, and so is this.
            return cast("StrEnum", value)


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
    """Text for an enum that grows, such as the options."""
    return Column(EnumText(values, length=length), nullable=False)


def text_column(values: type[StrEnum], *, nullable: bool = False) -> Any:
    """Text with a CHECK. A native enum type could never drop a value in a migration."""
    checked = Enum(values, native_enum=False, create_constraint=True, length=20)
    return Column(checked, nullable=nullable)


def job_id_column(*, primary_key: bool = False, index: bool | None = None) -> Any:
    key = ForeignKey("job.id", ondelete="CASCADE")
    return Column(String(12), key, primary_key=primary_key, index=index, nullable=False)


def study_id_column(*, primary_key: bool = False) -> Any:
    key = ForeignKey("study.id", ondelete="CASCADE")
    return Column(String(12), key, primary_key=primary_key, nullable=False)
