"""Writes the pages of the documentation that follow from the source, and `.env.example`.

    python docs/generate.py [FOLDER]

FOLDER is where `docs/` is: this repository, if it is left out. The pages depend on nothing but
the source: not on the machine, the day or `LOSSLAB_*` variables.
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path, PurePath
from typing import Any, Final

import typer
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from server.cli.main import app as command_line
from server.cli.reporting import UNDECIDED
from server.errors import BAD_INPUT, FAILED, INTERRUPTED
from server.judging.criteria import Thresholds
from server.main import create_app
from server.settings import Settings

ROOT: Final = Path(__file__).parent.parent

_NOTICE: Final = "<!-- Written by docs/generate.py; change the source and run `make docs`. -->"
_HELP_WIDTH: Final = 100
_COMMENT_WIDTH: Final = 96

#: What each group of routes is about, in the order of the page.
_TAGS: Final = {
    "jobs": "Jobs",
    "options": "Options",
    "studies": "Studies",
    "comparisons": "Comparisons",
    "datasets": "Data sets",
    "operations": "Workers and health",
}
_MEDIA_TYPES: Final = {
    "image/png": "a PNG picture",
    "text/html": "an HTML page",
    "text/plain": "text",
    "text/csv": "a CSV table",
    "text/event-stream": "server-sent events",
    "application/octet-stream": "a file",
}
#: The objects that have a page of their own.
_PAGES: Final = {
    "CriteriaSet": "criteria",
    "CriterionName": "criteria",
    "Diagnosis": "criteria",
    "EpochMetrics": "metrics",
}

Schema = Mapping[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT, help="where docs/ is")
    folder: Path = parser.parse_args().folder
    for name, text in render_all().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path)


def render_all() -> dict[str, str]:
    """Every generated file by its path in the repository."""
    # Without reading the environment, as `Settings()` would.
    api = create_app(Settings.model_construct()).openapi()
    return {
        ".env.example": render_env_example(),
        "docs/reference/settings.md": render_settings(),
        "docs/reference/http-api.md": render_api(api),
        "docs/reference/command-line.md": render_command_line(),
    }


# Settings


def render_settings() -> str:
    schemas = Settings.model_json_schema()["properties"]
    rows = [
        (
            _code(_variable(name)),
            _default(field),
            _bounds(schemas[name]),
            _one_line(_say(field.description)),
        )
        for name, field in Settings.model_fields.items()
    ]
    return _page(
        "# Settings",
        "Server, workers and command line read their settings from environment variables. An empty "
        "variable counts as not set. Each setting may also be a file in `/run/secrets`, where "
        "container engines put secrets, named like the variable in lower case; an environment "
        "variable takes precedence over the file.",
        "White space, carriage returns and one pair of quotation marks at the ends of a value are "
        "taken off, and `~` at the beginning of a path is the home folder. A value that cannot be "
        "used is refused at the start, in a line that names the variable and does not show the "
        "value. "
        "Commands do not look at settings that they do not use.",
        "`.env.example` in the repository's root lists the same settings as variables.",
        _table(("variable", "default", "bounds", "meaning"), rows),
    )


def render_env_example() -> str:
    """Every setting, commented out, with its default."""
    lines = [
        "# Every setting with its default. Written by docs/generate.py: run `make docs`.",
        "#",
        "# `docker compose` reads a copy of this file named .env, and passes on the variables that",
        "# docker/compose.base.yml names. A shell reads it by `set -a; . ./.env; set +a`.",
    ]
    for name, field in Settings.model_fields.items():
        lines += ["", *_wrap(_say(field.description).replace("`", ""), prefix="# ")]
        lines.append(f"#{_variable(name)}={_value(field)}")
    return "\n".join(lines) + "\n"


def _variable(name: str) -> str:
    return f"{Settings.model_config['env_prefix']}{name.upper()}"


def _default(field: FieldInfo) -> str:
    value = _value(field)
    return _code(value) if value else "empty"


def _value(field: FieldInfo) -> str:
    """A setting's default as a variable has it."""
    match field.default:
        case SecretStr() as secret:
            return secret.get_secret_value()
        case PurePath() as path:
            return path.as_posix()
        case tuple() as values:
            return ",".join(str(value) for value in values)
        case value:
            return _plain(value)


# HTTP API


def render_api(api: Schema) -> str:
    thresholds = Thresholds.model_json_schema()
    schemas: Schema = api["components"]["schemas"]
    return _page(
        "# HTTP API",
        "A running server shows the same routes at `/docs`, where they can be tried, and describes "
        "them at `/openapi.json`.",
        "Bodies are JSON. A body with an unknown field is refused. A list is "
        '`{"data": [...], "has_more": true | false}`.',
        *_describe_routes(api, thresholds=frozenset(thresholds["properties"])),
        "## Errors",
        _describe_errors(api),
        "## Thresholds",
        "Query parameters of verdicts, comparisons and studies, and a field of a study's request. "
        "See [criteria](criteria.md).",
        _describe_fields(thresholds),
        "## Objects",
        *_describe_objects(schemas),
    )


def _describe_routes(api: Schema, *, thresholds: frozenset[str]) -> Iterable[str]:
    for tag, title in _TAGS.items():
        yield f"## {title}"
        for path, operations in api["paths"].items():
            for method, operation in operations.items():
                if operation["tags"] == [tag]:
                    yield f"### {_code(f'{method.upper()} {path}')}"
                    yield from _describe_operation(operation, thresholds=thresholds)


def _describe_operation(operation: Schema, *, thresholds: frozenset[str]) -> Iterable[str]:
    yield _one_line(operation["description"])
    parameters = operation.get("parameters", [])
    own = [each for each in parameters if each["name"] not in thresholds and each["in"] != "path"]
    if own:
        rows = [
            (_code(each["name"]), each["in"], _type(each["schema"]), _meaning(each)) for each in own
        ]
        yield _table(("parameter", "in", "type", "meaning"), rows)
    if any(each["name"] in thresholds for each in parameters):
        yield "Takes every [threshold](#thresholds) as a query parameter."
    if "requestBody" in operation:
        optional = "" if operation["requestBody"].get("required") else " (optional)"
        yield f"Body{optional}: {_content(operation['requestBody'])}."
    yield f"Answers: {'; '.join(_describe_answers(operation['responses']))}."


def _describe_answers(responses: Schema) -> Iterable[str]:
    for status, response in sorted(responses.items()):
        if "application/problem+json" not in response.get("content", {}):
            content = _content(response)
            yield f"`{status}`{f' {content}' if content else ''}"


def _describe_errors(api: Schema) -> str:
    responses: dict[str, Schema] = {}
    for operations in api["paths"].values():
        for operation in operations.values():
            responses |= operation["responses"]
    rows = [
        (f"`{status}`", response["description"])
        for status, response in sorted(responses.items())
        if "application/problem+json" in response.get("content", {})
    ]
    return (
        "Every error is an `application/problem+json` document (RFC 9457), a [Problem](#problem). "
        "For a refused body or query, `errors` names the fields.\n\n"
        + _table(("status", "meaning"), rows)
    )


def _describe_objects(schemas: Schema) -> Iterable[str]:
    for name, schema in sorted(schemas.items()):
        if name.endswith("List") or name == Thresholds.__name__:  # which has a section of its own
            continue
        yield f"### {name}"
        if "description" in schema:
            yield _one_line(schema["description"])
        if name in _PAGES:
            yield f"See [{_PAGES[name]}]({_PAGES[name]}.md)."
        yield _list_choices(schema) if "enum" in schema else _describe_fields(schema)


def _describe_fields(schema: Schema) -> str:
    required = schema.get("required", ())
    rows = [
        (_code(name), _type(field), _meaning(field, is_required=name in required))
        for name, field in schema["properties"].items()
    ]
    return _table(("field", "type", "meaning"), rows)


def _list_choices(schema: Schema) -> str:
    return f"One of {', '.join(_code(choice) for choice in schema['enum'])}."


def _meaning(field: Schema, *, is_required: bool = False) -> str:
    """The description, the bounds and the default of a field or a parameter."""
    schema = field.get("schema", field)
    parts = [_one_line(field.get("description", "")), _bounds(schema)]
    default = schema.get("default")
    if not is_required and default not in (None, "", [], {}):
        parts.append(f"default {_code(_plain(default))}")
    return "; ".join(part for part in parts if part)


def _content(holder: Schema) -> str:
    """What a body or an answer has, as its schema or in words."""
    kinds = [
        _MEDIA_TYPES.get(media_type) or _type(content["schema"])
        for media_type, content in holder.get("content", {}).items()
    ]
    return " or ".join(kinds)


def _type(schema: Schema) -> str:
    """The type of a value, with a link to the object that it is."""
    match schema:
        case {"$ref": reference}:
            return _link(str(reference).rpartition("/")[2])
        case {"anyOf": choices}:
            return " or ".join(_type(choice) for choice in choices)
        case {"const": value} | {"enum": [value]}:
            return _code(value)
        case {"enum": values}:
            return " or ".join(_code(value) for value in values)
        case {"type": "array", "items": items}:
            return f"list of {_type(items)}"
        case {"type": "object", "additionalProperties": Mapping() as values}:
            return f"object of {_type(values)}"
        case {"type": "string", "format": "date-time"}:
            return "time"
        case {"type": str() as name}:
            return name
        case _:
            return "any"


def _link(name: str) -> str:
    if name.endswith("List"):
        return f"list of {_link(_LISTED.get(name, name.removesuffix('List')))}"
    return f"[{name}](#{name.lower()})"


#: The lists whose entries are named otherwise than the list.
_LISTED: Final = {
    "JobList": "JobPublic",
    "StudyList": "StudySummary",
    "MetricsList": "EpochMetrics",
    "OptionList": "OptionPublic",
    "DatasetList": "DatasetPublic",
    "WorkerList": "WorkerPublic",
}


def _bounds(schema: Schema) -> str:
    """The numbers that are allowed, as `from 1 to 100`."""
    names = {
        "exclusiveMinimum": "above",
        "minimum": "from",
        "maximum": "to",
        "exclusiveMaximum": "to below",
    }
    return " ".join(f"{word} {_plain(schema[key])}" for key, word in names.items() if key in schema)


# Command line


def render_command_line() -> str:
    commands = list(_walk_commands())
    overview = [
        (f"[{_code(name)}](#{name.replace(' ', '-')})", _summarise(context.command.help))
        for name, context in commands
    ]
    details = [
        text
        for name, context in commands
        for text in (f"## {_code(name)}", f"```text\n{context.get_help().strip()}\n```")
    ]
    return _page(
        "# Command line",
        "`make` installs `losslab` in `.venv/bin`.",
        _table(("command", "what it does"), overview),
        "Commands that ask a server find it at `LOSSLAB_URL` (default `http://127.0.0.1:8000`) and "
        "send `LOSSLAB_API_TOKEN` if it is set. All other settings are on [their own "
        "page](settings.md).",
        "`losslab --version` shows the versions of losslab, Python and torch.",
        f"Exit codes: 0 is success, {FAILED} is a failed job or request, {BAD_INPUT} is bad input, "
        f"{UNDECIDED} is a study that has ended without ruling out an arm or recommending one, "
        f"{INTERRUPTED} is Ctrl-C before the work was done.",
        *details,
    )


def _walk_commands() -> Iterator[tuple[str, Any]]:
    """Every command by its words, with its context; a group of commands before its commands."""
    group = typer.main.get_command(command_line)
    parent = _make_context(group, name="losslab", parent=None)
    for command in group.commands.values():  # type: ignore[attr-defined]
        context = _make_context(command, name=command.name, parent=parent)
        yield context.command_path, context
        for inner in getattr(command, "commands", {}).values():
            inner_context = _make_context(inner, name=inner.name, parent=context)
            yield inner_context.command_path, inner_context


def _summarise(help_text: str) -> str:
    """The first paragraph of a command's help."""
    return _one_line(help_text.partition("\n\n")[0])


def _make_context(command: Any, *, name: str, parent: Any) -> Any:
    # Without markup the help is plain text, of the width that is asked for.
    command.rich_markup_mode = None
    width = {"terminal_width": _HELP_WIDTH, "max_content_width": _HELP_WIDTH}
    return command.make_context(name, [], parent=parent, resilient_parsing=True, **width)


# Markdown


def _page(title: str, *blocks: str) -> str:
    return "\n\n".join([title, _NOTICE, *blocks]) + "\n"


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("|".join(["", *map(_pad, cells), ""]) for cells in lines)


def _pad(cell: str) -> str:
    return f" {cell} " if cell else " "


def _code(text: str) -> str:
    return f"`{text}`"


def _say(description: str | None) -> str:
    assert description, "every setting has a description"
    return description


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _plain(value: object) -> str:
    """A value as JSON and environment variables write it."""
    match value:
        case bool():
            return str(value).lower()
        case Enum():
            return str(value.value)
        case float():
            return f"{value:g}" if value < 1e6 else f"{value:.0f}"
        case _:
            return str(value)


def _wrap(text: str, *, prefix: str) -> list[str]:
    lines, line = [], prefix.rstrip()
    for word in text.split():
        if len(line) + 1 + len(word) > _COMMENT_WIDTH:
            lines.append(line)
            line = prefix.rstrip()
        line += f" {word}"
    return [*lines, line]


if __name__ == "__main__":
    main()
