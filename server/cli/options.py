"""`losslab option`: the built-in options and your own."""

from typing import Annotated

import typer
from rich.text import Text

from server.cli import arguments as arg
from server.cli import views
from server.cli.connections import open_client
from server.cli.reporting import console, print_answer, remember

app = typer.Typer(no_args_is_help=True, help="List options, add your own and delete them.")


@app.command("list", epilog="Example: losslab option list")
def list_options(as_json: arg.AsJson = False) -> None:
    """List the built-in options and your own, with their numbers of jobs."""
    with open_client() as client:
        page = client.list_options()
    print_answer(page, as_json=as_json, view=views.options_table)


@app.command("add", epilog="Example: losslab option add b_soft --base b --set free_bits=0.1")
def add_option(
    name: arg.OptionName,
    base: Annotated[str, typer.Option(help="The option to start from.", show_default=False)],
    set_keys: arg.SetSettings = None,
    summary: Annotated[str, typer.Option(help="Shown beside the name.")] = "",
    as_json: arg.AsJson = False,
) -> None:
    """Add an option of your own: a base and the settings in which it differs.

    It never changes. The same option again is no error.
    """
    config = arg.collect_overrides(set_keys)
    with open_client() as client:
        option = client.add_option(name, base, config, summary)
        remember(f"option {name} was added")
    print_answer(option, as_json=as_json, view=views.option_view)


@app.command("delete", epilog="Example: losslab option delete b_soft")
def delete_option(name: arg.OptionName) -> None:
    """Delete an option of your own. Its jobs stay as they are."""
    with open_client() as client:
        client.delete_option(name)
        remember(f"option {name} was deleted")
    console.print(Text(f"Option {name} is deleted."), soft_wrap=True)
