"""What a command prints: answers, paths, and errors as one line with an exit code.

Slow imports are inside the functions that need them, as in `server.cli.main`.
"""

import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from server.errors import BAD_INPUT, FAILED, LosslabError, drop_consequences

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Json = dict[str, Any]

#: The exit code of a study that ruled nothing out: more seeds are needed, or no arm passes.
UNDECIDED: Final = 3
#: 128 plus SIGINT's number, the convention of shells.
INTERRUPTED: Final = 130

console: Final = Console()
error_console: Final = Console(stderr=True)


def print_answer(answer: Json, *, as_json: bool, view: Callable[[Json], RenderableType]) -> None:
    if as_json:
        print_json(answer)
    else:
        console.print(view(answer))


def print_json(answer: Json) -> None:
    typer.echo(json.dumps(answer, indent=2, ensure_ascii=False, allow_nan=False))


def print_paths(paths: dict[str, Path]) -> None:
    """One line per path, after its label."""
    for label, path in paths.items():
        console.print(Text(f"{label.capitalize():<9} {path}"), soft_wrap=True)


def check_report(path: Path, *, suffixes: Collection[str]) -> None:
    """Check where a report is to go before anything slow, whose result would then be lost.

    Raises typer.BadParameter.
    """
    if path.suffix not in suffixes:
        *first, last = suffixes
        allowed = f"{', '.join(first)} or {last}"
        raise typer.BadParameter(f"the report ends in {allowed}, not {path.suffix!r}")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"for the report there is no folder {path.parent}")


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
    from pydantic import ValidationError  # noqa: PLC0415

    if isinstance(error, ValidationError):
        is_setting = error.title == "Settings"
        items = drop_consequences(error.errors())
        return "; ".join(_describe_item(item, is_setting=is_setting) for item in items)
    message = str(error).partition("\n")[0]
    if isinstance(error, LosslabError) and error.status == HTTPStatus.UNAUTHORIZED:
        return f"{message}; set LOSSLAB_API_TOKEN to a valid one"
    return message


def print_error(message: str) -> None:
    error_console.print(Text.assemble(("Error: ", "bold red"), message), soft_wrap=True)


def _find_exit_code(error: Exception) -> int | None:
    """The exit code of an error; None for a bug."""
    from pydantic import ValidationError  # noqa: PLC0415
    from sqlalchemy.exc import SQLAlchemyError  # noqa: PLC0415

    match error:
        case LosslabError():
            return error.exit_code
        case ValidationError():
            return BAD_INPUT
        case SQLAlchemyError() | OSError():
            return FAILED
        case _:
            return None


def _describe_item(item: "ErrorDetails", *, is_setting: bool) -> str:
    """The field, what is allowed, and the input, unless it is a setting, which may be a secret, or
    a whole object."""
    field = ".".join(str(part) for part in item["loc"])
    if field and is_setting:
        field = f"LOSSLAB_{field.upper()}"
    message = item["msg"].removeprefix("Value error, ")
    if not is_setting and not isinstance(item["input"], dict):
        message += f", not {item['input']!r}"
    return f"{field}: {message}" if field else message
