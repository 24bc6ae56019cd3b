"""The errors that users are told of: one family, whichever way a user comes in.

Each class carries what HTTP answers (RFC 9457: status and title) and the exit code of a command.
A new error derives from the class here that fits, and both the API and the command line know it.
"""

from http import HTTPStatus
from typing import Final

#: The exit codes of a command that failed, and of one whose input was wrong.
FAILED: Final = 1
BAD_INPUT: Final = 2


class LosslabError(Exception):
    """Something that the user can understand and mostly mend; the message is for the user."""

    status: int = HTTPStatus.INTERNAL_SERVER_ERROR
    exit_code: int = FAILED
    #: The field of a request that is wrong, where it is always the same one.
    field: str | None = None

    @property
    def title(self) -> str:
        return HTTPStatus(self.status).phrase


class InvalidInputError(LosslabError, ValueError):
    """What was asked for cannot be done."""

    status = HTTPStatus.UNPROCESSABLE_ENTITY
    exit_code = BAD_INPUT


class NotFoundError(LosslabError):
    """There is nothing of this name."""

    status = HTTPStatus.NOT_FOUND


class ConflictError(LosslabError):
    """The state of things does not allow this now."""

    status = HTTPStatus.CONFLICT


class TooManyRequestsError(LosslabError):
    """The service has as much to do as it may; the same request may succeed later."""

    status = HTTPStatus.TOO_MANY_REQUESTS


class TooLargeError(LosslabError):
    """More was sent than is taken."""

    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE


class StorageFullError(LosslabError):
    """There is no room for what was sent."""

    status = HTTPStatus.INSUFFICIENT_STORAGE
