"""What a command prints: answers, paths, and errors as one line with an exit code.

Slow imports are inside the functions that need them, as in `server.cli.main`.
"""

import errno
import json
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import typer
from rich.console import Console, RenderableType
from rich.segment import Segment
from rich.text import Text

from server import messages
from server.environment.access import AccessError, check_writable
from server.errors import BAD_INPUT, FAILED, InvalidInputError, LosslabError
from server.messages import redact
from server.texts import escape_controls, make_inert

Json = dict[str, Any]

#: The exit code of a study that ruled nothing out: more seeds are needed, or no arm passes.
UNDECIDED: Final = 3

#: What the system says when standard output takes no more.
OUTPUT_ERRORS: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})


class InertConsole(Console):
    """A console on which a text of a user neither commands the terminal nor turns what stands
    beside it."""

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        # The last step before the output: here a text is what remains of it in its place.
        return super()._render_buffer(
            segment if segment.control else segment._replace(text=make_inert(segment.text))
            for segment in buffer
        )


console: Final = InertConsole()
error_console: Final = InertConsole(stderr=True)

_done: list[str] = []


def print_answer(answer: Json, *, as_json: bool, view: Callable[[Json], RenderableType]) -> None:
    if as_json:
        print_json(answer)
    else:
        console.print(view(answer))


def print_json(answer: Json) -> None:
    # Escapes are the same JSON, and every terminal can show them.
    is_unicode = console.encoding.startswith("utf")
    text = json.dumps(answer, indent=2, ensure_ascii=not is_unicode, allow_nan=False)
    typer.echo(escape_controls(text))


def print_paths(paths: dict[str, Path]) -> None:
    """One line per path, after its label."""
    for label, path in paths.items():
        console.print(Text(f"{label.capitalize():<9} {path}"), soft_wrap=True)


def save_report(path: Path, content: bytes) -> None:
    """Raises AccessError."""
    try:
        path.write_bytes(content)
    except OSError as error:
        raise AccessError.of(error, path=path) from None


def check_report(path: Path, *, suffixes: Collection[str]) -> None:
    """Check where a report is to go before anything slow, whose result would then be lost.

    Raises typer.BadParameter.
    """
    if path.suffix not in suffixes:
        *first, last = suffixes
        allowed = f"{', '.join(first)} or {last}"
        raise typer.BadParameter(f"the report ends in {allowed}, not {path.suffix!r}")
    try:
        check_target(path, what="report")
    except InvalidInputError as error:
        raise typer.BadParameter(str(error)) from None


def check_target(path: Path, *, what: str) -> None:
    """Check that a file can be made or replaced. Raises InvalidInputError."""
    if not path.absolute().parent.is_dir():
        raise InvalidInputError(f"for the {what} there is no folder {path.absolute().parent}")
    try:
        check_writable(path if path.exists() else path.absolute().parent)
    except AccessError as error:
        raise InvalidInputError(f"the {what} cannot be written: {error}") from None


@contextmanager
def report_errors() -> Iterator[None]:
    """Print an error that the user can fix as one line on stderr, and exit with its code.

    Any other error is a bug and keeps its traceback.
    """
    try:
        yield
    except Exception as error:
        code = _find_exit_code(error)
        if code is None:
            raise
        print_error(describe_error(error))
        raise typer.Exit(code) from None


def describe_error(error: Exception) -> str:
    """The error in one line."""
    match error:
        case LosslabError(status=HTTPStatus.UNAUTHORIZED):
            return f"{messages.describe_error(error)}; set LOSSLAB_API_TOKEN to a valid one"
        case OSError(filename=None, errno=number) if number in OUTPUT_ERRORS:
            return describe_output_error(error)
        case _:
            return messages.describe_error(error)


def describe_output_error(error: OSError) -> str:
    """What was done all the same is named: nobody may have been told of it."""
    reason = (error.strerror or str(error)).lower()
    return "; ".join([f"the output cannot be written ({reason})", *_done])


def remember(done: str) -> None:
    """Let an error of the output say what the command has done before."""
    _done.append(done)


def print_error(message: str) -> None:
    line = Text.assemble(("Error: ", "bold red"), redact(message))
    error_console.print(line, soft_wrap=True)


def _find_exit_code(error: Exception) -> int | None:
    """The exit code of an error; None for a bug."""
    from pydantic import ValidationError  # noqa: PLC0415
    from pydantic_settings import SettingsError  # noqa: PLC0415
    from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415

    match error:
        case LosslabError():
            return error.exit_code
        case ValidationError() | SettingsError():
            return BAD_INPUT
        case BrokenPipeError():
            return None  # whoever read the output has gone
        case SQLAlchemyError() | OSError():
            return FAILED
        case _:
            return None
