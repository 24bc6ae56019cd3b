"""Arguments and options that several `losslab` commands share."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

from server.environment.variables import expand_home

Pairs = list[str] | None

#: The largest page of the API, whose module takes too long to import here.
MAX_JOBS: Final = 100
_OWN_OPTIONS: Final = {"option", "quick_test", "name", "metadata"}


def expand_path(path: Path | None) -> Path | None:
    """Shells leave the ~ of --log=~/x as it is."""
    if path is None:
        return None
    try:
        return expand_home(path)
    except ValueError as error:
        raise typer.BadParameter(f"{path} {error}") from None


DataDir = Annotated[
    Path | None,
    typer.Option(
        help="For runs, data sets and the database. Default: experiments.", callback=expand_path
    ),
]
Host = Annotated[str | None, typer.Option(help="Loopback address. Default: 127.0.0.1.")]
Port = Annotated[int | None, typer.Option(min=0, max=65535, help="0: any free one. Default: 8000.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
LossOption = Annotated[str, typer.Option(help="The loss: a, b, c or an option of your own.")]
QuickTest = Annotated[bool, typer.Option("--quick-test", help="5 epochs, each with a checkpoint.")]
JobName = Annotated[str | None, typer.Option(help="A name for the job.")]
Data = Annotated[str | None, typer.Option(help="atomic, arc, or the name of an .npz file.")]
Epochs = Annotated[int | None, typer.Option(help="Epochs to train.")]
NumSamples = Annotated[int | None, typer.Option(help="Number of grids.")]
BatchSize = Annotated[int | None, typer.Option(help="Grids per step.")]
LearningRate = Annotated[float | None, typer.Option(help="Start of the cosine decay.")]
LatentDim = Annotated[int | None, typer.Option(help="Dimensions of the latent space.")]
Beta = Annotated[float | None, typer.Option(help="Weight of the KL; 1 is the plain ELBO.")]
Seed = Annotated[
    int | None, typer.Option(help="Seed of the training, and of the data unless data_seed is set.")
]
SetKeys = Annotated[
    Pairs, typer.Option("--set", metavar="KEY=VALUE", help="Any other configuration key.")
]
SetSettings = Annotated[
    Pairs, typer.Option("--set", metavar="KEY=VALUE", help="A setting; may be repeated.")
]
Metadata = Annotated[
    Pairs, typer.Option("--metadata", "-m", metavar="KEY=VALUE", help="A label for the job.")
]
Log = Annotated[
    Path | None,
    typer.Option(dir_okay=False, help="Also write the log to this file.", callback=expand_path),
]
StudyReport = Annotated[
    Path | None,
    typer.Option(
        dir_okay=False,
        help="Save the report: .html, .md, .png or .csv.",
        callback=expand_path,
    ),
]
NoWandb = Annotated[
    bool, typer.Option("--no-wandb", help="Log nothing to Weights & Biases (the default).")
]
WandbProject = Annotated[
    str | None, typer.Option(help="Also log to this Weights & Biases project.")
]
Criteria = Annotated[
    Literal["spec", "evidence"] | None,
    typer.Option(help="The criteria to judge by: of what is painted, or of what is known."),
]
Wait = Annotated[bool, typer.Option("--wait", help="Show progress until the job ends.")]


def _refuse_empty(text: str) -> str:
    """Refuse what an unset variable of a script would give."""
    if not text:
        raise typer.BadParameter("it is empty")
    return text


JobId = Annotated[
    str,
    typer.Argument(metavar="ID", help="The job's id.", show_default=False, callback=_refuse_empty),
]
StudyId = Annotated[
    str,
    typer.Argument(
        metavar="ID", help="The study's id.", show_default=False, callback=_refuse_empty
    ),
]
OptionName = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="The option's name.", show_default=False, callback=_refuse_empty
    ),
]


def collect_overrides(set_keys: Pairs, **values: Any) -> dict[str, Any]:
    """The settings given by their own options and by `--set`, which takes precedence."""
    named = {key: value for key, value in values.items() if value is not None}
    extra = {key: _parse_value(text) for key, text in parse_pairs(set_keys).items()}
    for key, value in (named | extra).items():
        _check_finite(key, value)
    if taken := sorted(extra.keys() & _OWN_OPTIONS):
        raise typer.BadParameter(f"--set cannot change {', '.join(taken)}; it has its own option")
    return named | extra


def parse_pairs(pairs: Pairs) -> dict[str, str]:
    """Split KEY=VALUE pairs. Raises typer.BadParameter if one is invalid."""
    return dict(_split_pair(pair, form="KEY=VALUE") for pair in pairs or [])


def parse_grid(texts: Sequence[str] | None) -> dict[str, list[Any]]:
    """Split KEY=VALUE,VALUE,... texts. Raises typer.BadParameter, which names the key."""
    grid: dict[str, list[Any]] = {}
    for key, text in (_split_pair(text, form="KEY=VALUE,VALUE,...") for text in texts or []):
        if key in grid:
            raise typer.BadParameter(f"grid.{key} is given twice; list its values with commas")
        grid[key] = [_parse_value(value.strip()) for value in text.split(",")]
        for value in grid[key]:
            if value == "":
                raise typer.BadParameter(f"grid.{key}: a value is empty in {text!r}")
            _check_finite(f"grid.{key}", value)
    return grid


def _split_pair(pair: str, *, form: str) -> tuple[str, str]:
    key, separator, value = pair.partition("=")
    if not separator or not key:
        raise typer.BadParameter(f"{pair!r} is not {form}")
    return key, value


def _check_finite(key: str, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise typer.BadParameter(f"{key} must be a finite number, not {value}")


def _parse_value(text: str) -> Any:
    """The text as JSON, such as a number or a boolean; the text itself if it is not JSON."""
    try:
        return json.loads(text)
    except ValueError:
        return text
