"""Errors that are reported to users, shared by the API and the command line.

Each class has the HTTP status and title (RFC 9457) and the exit code of a command. A new error
derives from the class here that fits, so that the API and the command line both report it.
"""

from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Final, TypeVar

#: The exit codes of a command that failed, and of a command with invalid input.
FAILED: Final = 1
BAD_INPUT: Final = 2
#: 128 plus SIGINT's number, the convention of shells.
INTERRUPTED: Final = 130

_Entry = TypeVar("_Entry", bound=Mapping[str, object])


class LosslabError(Exception):
    """An error with a message for the user, who can usually fix it."""

    status: int = HTTPStatus.INTERNAL_SERVER_ERROR
    exit_code: int = FAILED
    #: The invalid field of a request, if it is always the same one.
    field: str | None = None

    @property
    def title(self) -> str:
        return HTTPStatus(self.status).phrase


class InvalidInputError(LosslabError, ValueError):
    """The input is invalid."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    exit_code = BAD_INPUT


class NotFoundError(LosslabError):
    """Nothing has this name."""

    status = HTTPStatus.NOT_FOUND


class ConflictError(LosslabError):
    """The current state does not allow the request."""

    status = HTTPStatus.CONFLICT


class TooManyRequestsError(LosslabError):
    """The service is at one of its limits; the same request may succeed later."""

    status = HTTPStatus.TOO_MANY_REQUESTS


class TooLargeError(LosslabError):
    """The body is larger than allowed."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class UnavailableError(LosslabError):
    """Something that the service needs is away; the same request may succeed later."""

    status = HTTPStatus.SERVICE_UNAVAILABLE


class StorageFullError(LosslabError):
    """There is no space on the disk for the request."""

    status = HTTPStatus.INSUFFICIENT_STORAGE


def drop_consequences(errors: Iterable[_Entry]) -> list[_Entry]:
    """Pydantic's errors without those of fields whose default follows from an invalid field."""
    return [error for error in errors if error["type"] != "default_factory_not_called"]
