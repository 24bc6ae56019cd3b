"""Column types that several tables share, for both SQLite and PostgreSQL."""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import Column, DateTime, Dialect, Enum, ForeignKey, String, TypeDecorator


class UTCDateTime(TypeDecorator[datetime]):
    """Time-zone aware UTC on both databases; SQLite itself stores no time zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        return value.astimezone(UTC) if value else None

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        return value.replace(tzinfo=UTC) if value and value.tzinfo is None else value


def utc_now() -> datetime:
    return datetime.now(UTC)


def text_column(values: type[StrEnum], *, nullable: bool = False) -> Any:
    """Text with a CHECK. A native enum type could never drop a value in a migration."""
    checked = Enum(values, native_enum=False, create_constraint=True, length=20)
    return Column(checked, nullable=nullable)


def job_id_column(*, primary_key: bool = False, index: bool | None = None) -> Any:
    key = ForeignKey("job.id", ondelete="CASCADE")
    return Column(String(12), key, primary_key=primary_key, index=index, nullable=False)
