"""`losslab data`: data sets of your own, from files as people have them.

Slow imports are inside the functions that need them, as in `server.cli.main`.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from server.cli import arguments as arg
from server.cli import views
from server.cli.connections import open_client, read_settings
from server.cli.reporting import console, print_answer, report_errors

if TYPE_CHECKING:
    from server.settings import Settings

Json = dict[str, Any]

app = typer.Typer(no_args_is_help=True, help="Import data of your own, and list data sets.")


@app.command("import", epilog="Example: losslab data import arc-training.zip --name arc30 --pad 32")
def import_data(
    path: Annotated[
        Path,
        typer.Argument(help="An .npz, an .npy, ARC tasks as JSON or as a zip.", show_default=False),
    ],
    name: Annotated[
        str | None, typer.Option(help="Of the data set. Default: that of the file.")
    ] = None,
    pad: Annotated[
        int | None, typer.Option(help="Fill up grids to this size, with background.")
    ] = None,
    crop: Annotated[
        int | None, typer.Option(help="Cut larger grids to this size, from the top left.")
    ] = None,
    local: Annotated[
        bool, typer.Option("--local", help="Into the data directory, without a server.")
    ] = False,
    data_dir: arg.DataDir = None,
    as_json: arg.AsJson = False,
) -> None:
    """Import a file as a data set of the server at LOSSLAB_URL, or of this machine.

    ARC tasks are split by task, and their grids filled up to one size.
    """
    if data_dir is not None and not local:
        raise typer.BadParameter("--data-dir needs --local; a server has its own")
    with report_errors():
        chosen = _choose_name(path, name)
    if local:
        with report_errors():
            dataset = _import_here(
                path, read_settings(data_dir=data_dir), name=chosen, pad=pad, crop=crop
            )
    else:
        with open_client() as client:
            dataset = client.import_dataset(chosen, path, pad=pad, crop=crop)
    print_answer(dataset, as_json=as_json, view=views.dataset_view)
    if not as_json:
        hint = f"losslab {'train' if local else 'submit'} --option b --data {chosen}"
        console.print(Text(hint, style="dim"), soft_wrap=True)


@app.command("list", epilog="Example: losslab data list")
def list_data(as_json: arg.AsJson = False) -> None:
    """List data sets, and the files in their folder that are none."""
    with open_client() as client:
        page = client.list_datasets()
    print_answer(page, as_json=as_json, view=views.datasets_table)


def _choose_name(path: Path, name: str | None) -> str:
    """The data set's name. Raises InvalidInputError and OSError."""
    from server.errors import InvalidInputError  # noqa: PLC0415
    from server.models.names import MatchingName, suggest_name  # noqa: PLC0415

    if path.is_dir():
        raise InvalidInputError(f"{path} is a folder; give a file, or a zip of the ARC tasks in it")
    with path.open("rb"):
        pass  # said before anything is sent
    try:
        return MatchingName.check(name or suggest_name(path.name) or path.name)
    except ValueError as error:
        raise InvalidInputError(f"--name {error}") from None


def _import_here(
    path: Path, settings: "Settings", *, name: str, pad: int | None, crop: int | None
) -> Json:
    """Store the data set in the data directory. Raises DatasetError and DatasetExistsError."""
    import shutil  # noqa: PLC0415

    from server.environment.modes import prepare_data_dir  # noqa: PLC0415
    from server.files.datasets import check_free, open_upload  # noqa: PLC0415
    from server.files.imports import Fit, check_fit  # noqa: PLC0415
    from server.files.inspection import admit_upload, check_upload  # noqa: PLC0415

    check_free(name)
    check_fit(Fit(pad, crop))
    prepare_data_dir(
        settings.data_dir, parts=settings.file_dirs, with_group=settings.shared_with_group
    )
    with path.open("rb") as source, open_upload(settings.datasets_dir) as file:
        shutil.copyfileobj(source, file)
        checked = check_upload(file, fit=Fit(pad, crop), shown_name=path.name)
        admit_upload(file, checked, name=name, datasets_dir=settings.datasets_dir)
    contents = checked.contents
    counts = contents.colour_counts
    return {
        "name": name,
        "num_grids": contents.num_grids,
        "grid_size": contents.grid_size,
        "colour_counts": counts,
        "background_share": counts[0] / sum(counts),
        "note": checked.note,
    }
