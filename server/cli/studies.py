"""`losslab study`: options times seeds, judged as groups.

Slow imports are inside the functions that need them, as in `server.cli.main`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.text import Text
from typer.core import TyperGroup

from server.cli import arguments as arg
from server.cli import local
from server.cli.connections import open_client, open_private_client, read_private_settings
from server.cli.processes import StopSignal
from server.cli.reporting import (
    UNDECIDED,
    check_report,
    console,
    error_console,
    print_answer,
    print_error,
    remember,
    report_errors,
    save_report,
)
from server.cli.study_views import (
    StudyProgress,
    deleted_text,
    plan_view,
    studies_table,
    study_view,
)
from server.errors import FAILED, INTERRUPTED

if TYPE_CHECKING:
    from server.client import LosslabClient
    from server.connection import Criteria
    from server.settings import Settings
    from server.study_client import StudyFields, StudyReportFormat

Json = dict[str, Any]
#: Waits for the study with this id, and says each time how it is.
Follow = Callable[[str, Callable[[Json], None]], Json]

_RUN: Final = "run"
DEFAULT_NUM_SEEDS: Final = 5  # of the API, whose module takes too long to import here
_REPORT_FORMATS: Final[dict[str, "StudyReportFormat"]] = {
    ".html": "html",
    ".md": "md",
    ".png": "curves",
    ".csv": "jobs",
}
_ANSWERED: Final = frozenset({"decided", "narrowed"})
_LOCAL_LOG = "study.log"


class RunByDefault(TyperGroup):
    """`losslab study a b` is `losslab study run a b`: what is no command belongs to `run`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, *ctx.help_option_names}:
            args = [_RUN, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=RunByDefault,
    no_args_is_help=True,
    subcommand_metavar="OPTION... | COMMAND [ARGS]...",
    help="Compare options by several seeds of each. `losslab study a b c` is short for `losslab "
    "study run a b c`.",
    epilog="Example: losslab study a b c --seeds 10",
)


@app.command(_RUN, epilog="Example: losslab study run a b c --seeds 10 --quick")
def run(
    options: Annotated[
        list[str], typer.Argument(metavar="OPTION", help="a, b, c or options of your own.")
    ],
    seeds: Annotated[
        int | None, typer.Option(min=1, max=100, help="Seeds of each arm. Default: 5.")
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE,...", help="Each option with each of these values."),
    ] = None,
    set_keys: arg.SetKeys = None,
    quick: Annotated[
        bool, typer.Option("--quick", "--quick-test", help="5 epochs, each with a checkpoint.")
    ] = False,
    until_decided: Annotated[
        bool, typer.Option("--until-decided", help="A race: more seeds until one arm is decided.")
    ] = False,
    max_seeds: Annotated[
        int | None, typer.Option(min=1, max=100, help="Of each arm of a race. Default: 40.")
    ] = None,
    reuse: Annotated[
        bool, typer.Option("--reuse", help="Take finished jobs of the same configuration and seed.")
    ] = False,
    criteria: arg.Criteria = None,
    threshold: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Of a criterion, such as min_accuracy=0.6."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="A name for the study.")] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option("--metadata", "-m", metavar="KEY=VALUE", help="A label for study and jobs."),
    ] = None,
    data: arg.Data = None,
    epochs: arg.Epochs = None,
    num_samples: arg.NumSamples = None,
    batch_size: arg.BatchSize = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show the arms, the jobs and the time.")
    ] = False,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not wait for the end.")] = False,
    report: arg.StudyReport = None,
    is_local: Annotated[
        bool, typer.Option("--local", help="On this machine, without a running server.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --local. Default: one per core, one on a GPU.")
    ] = None,
    data_dir: arg.DataDir = None,
    as_json: arg.AsJson = False,
) -> None:
    """Train each option with several seeds, and say which passes more often.

    The exit code is 0 if at least one arm is ruled out or recommended, and 3 if nothing is decided.
    """
    fields: StudyFields = {
        "num_seeds": seeds,
        "grid": arg.parse_grid(grid),
        "config": arg.collect_overrides(
            set_keys, dataset=data, epochs=epochs, num_samples=num_samples, batch_size=batch_size
        ),
        "quick_test": quick,
        "until_decided": until_decided,
        "max_seeds": max_seeds,
        "reuse": reuse,
        "name": name,
        "metadata": arg.parse_pairs(metadata),
        "criteria": criteria,
        "thresholds": arg.collect_overrides(threshold),
        "priority": local.LOCAL_PRIORITY if is_local else 0,
    }
    _check_together(is_local=is_local, no_wait=no_wait, workers=workers, data_dir=data_dir)
    if report is not None:
        _check_report(report, no_wait=no_wait)
    own = read_private_settings(data_dir=data_dir) if is_local else None
    stop = StopSignal()
    num_workers = _choose_num_workers(workers, options, fields, settings=own)
    if dry_run:
        place = _own_server(own, num_workers=0, stop=stop) if own else _running_server()
        with place as (client, _):
            plan = _plan(client, options, fields, num_own_workers=num_workers)
        print_answer(plan, as_json=as_json, view=plan_view)
        return
    place = _own_server(own, num_workers=num_workers, stop=stop) if own else _running_server()
    with place as (client, follow):
        study = client.create_study(options, **fields)
        remember(f"study {study['id']} was posted")
        if no_wait:
            _print_started(study, as_json=as_json)
            return
        study = _follow(study["id"], follow=follow)
        if report is not None:
            _save_report(client, study["id"], path=report)
    _print_and_exit(study, as_json=as_json, stop=stop)


@app.command("list", epilog="Example: losslab study list --limit 50")
def list_studies(
    limit: Annotated[
        int, typer.Option(min=1, max=arg.MAX_JOBS, help="Maximum number of studies.")
    ] = 20,
    as_json: arg.AsJson = False,
) -> None:
    """List studies, newest first."""
    with open_client() as client:
        page = client.list_studies(limit)
    print_answer(page, as_json=as_json, view=studies_table)


@app.command(epilog="Example: losslab study show 3f2a9c51d07e")
def show(study_id: arg.StudyId, criteria: arg.Criteria = None, as_json: arg.AsJson = False) -> None:
    """Show a study, its arms and its decision so far."""
    with open_client() as client:
        study = client.read_study(study_id, criteria)
    print_answer(study, as_json=as_json, view=study_view)


@app.command(epilog="Example: losslab study wait 3f2a9c51d07e")
def wait(study_id: arg.StudyId, as_json: arg.AsJson = False) -> None:
    """Wait until a study has ended, then show it; ends as `losslab study run` does."""
    with _running_server() as (_, follow):
        study = _follow(study_id, follow=follow)
    _print_and_exit(study, as_json=as_json)


@app.command(epilog="Example: losslab study cancel 3f2a9c51d07e")
def cancel(study_id: arg.StudyId, as_json: arg.AsJson = False) -> None:
    """Cancel all jobs of a study that have not ended."""
    with open_client() as client:
        study = client.cancel_study(study_id)
        remember(f"study {study_id} was cancelled")
    print_answer(study, as_json=as_json, view=study_view)


@app.command(epilog="Example: losslab study pause 3f2a9c51d07e")
def pause(study_id: arg.StudyId, as_json: arg.AsJson = False) -> None:
    """Pause all jobs of a study that have not ended."""
    with open_client() as client:
        study = client.pause_study(study_id)
        remember(f"study {study_id} was paused")
    print_answer(study, as_json=as_json, view=study_view)


@app.command(epilog="Example: losslab study resume 3f2a9c51d07e")
def resume(study_id: arg.StudyId, as_json: arg.AsJson = False) -> None:
    """Continue the paused, cancelled and lost jobs of a study."""
    with open_client() as client:
        study = client.resume_study(study_id)
        remember(f"study {study_id} was resumed")
    print_answer(study, as_json=as_json, view=study_view)


@app.command(epilog="Example: losslab study add 3f2a9c51d07e --seeds 5")
def add(
    study_id: arg.StudyId,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="Further seeds of each arm.")],
    as_json: arg.AsJson = False,
) -> None:
    """Queue further seeds of each arm that a study has, of a race of each kept arm."""
    with open_client() as client:
        study = client.add_seeds(study_id, seeds)
        remember(f"study {study_id} has {seeds} more seeds")
    _print_started(study, as_json=as_json)


@app.command(epilog="Example: losslab study report 3f2a9c51d07e --output report.html")
def report(
    study_id: arg.StudyId,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            dir_okay=False,
            help="A file: .html, .md, .png (curves) or .csv.",
            callback=arg.expand_path,
        ),
    ],
    per_epoch: Annotated[
        bool, typer.Option("--per-epoch", help="In .csv: a row for each epoch, not each job.")
    ] = False,
    criteria: arg.Criteria = None,
) -> None:
    """Save the report of a study."""
    check_report(output, suffixes=_REPORT_FORMATS)
    if per_epoch and output.suffix != ".csv":
        raise typer.BadParameter("--per-epoch is for a .csv file")
    with open_client() as client:
        _save_report(client, study_id, path=output, per_epoch=per_epoch, criteria=criteria)


@app.command(epilog="Example: losslab study delete 3f2a9c51d07e --keep-jobs")
def delete(
    study_id: arg.StudyId,
    keep_jobs: Annotated[
        bool, typer.Option("--keep-jobs", help="Keep the jobs of the study and their files.")
    ] = False,
    as_json: arg.AsJson = False,
) -> None:
    """Delete a study that has ended, with its jobs and their files."""
    with open_client() as client:
        deleted = client.delete_study(study_id, keep_jobs)
        remember(f"study {study_id} was deleted")
    print_answer(deleted, as_json=as_json, view=deleted_text)


def _check_together(
    *, is_local: bool, no_wait: bool, workers: int | None, data_dir: Path | None
) -> None:
    if is_local and no_wait:
        raise typer.BadParameter("--local waits; nothing would be left to train with --no-wait")
    for given, flag in ((workers, "--workers"), (data_dir, "--data-dir")):
        if given is not None and not is_local:
            raise typer.BadParameter(f"{flag} needs --local; a running server has its own")


def _check_report(path: Path, *, no_wait: bool) -> None:
    if no_wait:
        raise typer.BadParameter("--report needs the end of the study, so not --no-wait")
    check_report(path, suffixes=_REPORT_FORMATS)


def _choose_num_workers(
    workers: int | None,
    options: Sequence[str],
    fields: "StudyFields",
    *,
    settings: "Settings | None",
) -> int:
    """The workers of a server of this command's own, if it has one."""
    if settings is None:
        return 1
    if chosen := workers or settings.chosen_num_workers:
        return chosen
    num_arms = len(options) * math.prod(len(values) for values in (fields["grid"] or {}).values())
    return local.choose_num_workers(num_arms * (fields["num_seeds"] or DEFAULT_NUM_SEEDS))


@contextmanager
def _running_server() -> "Iterator[tuple[LosslabClient, Follow]]":
    with open_client() as client:
        yield client, partial(_wait, client)


@contextmanager
def _own_server(
    settings: "Settings", *, num_workers: int, stop: StopSignal
) -> "Iterator[tuple[LosslabClient, Follow]]":
    """A server with workers, which are stopped at the end. A signal to stop cancels the study."""
    with (
        report_errors(),
        stop,
        local.local_service(
            settings, num_workers=num_workers, stop=stop, log_name=_LOCAL_LOG
        ) as service,
        open_private_client(service.url) as client,
    ):
        yield client, partial(local.follow_study, service, client)


def _plan(
    client: "LosslabClient", options: Sequence[str], fields: "StudyFields", *, num_own_workers: int
) -> Json:
    """What would be queued; the server does not know of workers that are not started yet."""
    plan = client.plan_study(options, **fields)
    if plan["estimated_seconds"] is not None:
        plan["estimated_seconds"] /= num_own_workers
    return plan


def _follow(study_id: str, *, follow: Follow) -> Json:
    with StudyProgress(error_console) as progress:
        return follow(study_id, progress.update)


def _wait(client: "LosslabClient", study_id: str, on_update: Callable[[Json], None]) -> Json:
    try:
        return client.wait_study(study_id, on_update=on_update)
    except KeyboardInterrupt:
        print_error(
            f"stopped waiting; study {study_id} goes on (losslab study cancel {study_id} stops it, "
            f"losslab study wait {study_id} waits again)"
        )
        raise typer.Exit(INTERRUPTED) from None


def _save_report(
    client: "LosslabClient",
    study_id: str,
    *,
    path: Path,
    per_epoch: bool = False,
    criteria: "Criteria | None" = None,
) -> None:
    form = "metrics" if per_epoch else _REPORT_FORMATS[path.suffix]
    save_report(path, client.download_study_report(study_id, form, criteria))
    error_console.print(Text(f"Report: {path}"), soft_wrap=True)


def _print_started(study: Json, *, as_json: bool) -> None:
    print_answer(study, as_json=as_json, view=study_view)
    if not as_json:
        console.print(f"losslab study wait {study['id']}", style="dim", highlight=False)


def _print_and_exit(study: Json, *, as_json: bool, stop: StopSignal | None = None) -> None:
    """Raises typer.Exit unless the study has ended with an answer."""
    print_answer(study, as_json=as_json, view=study_view)
    if study["status"] in ("cancelled", "paused"):
        resume = f"losslab study resume {study['id']} continues it"
        print_error(f"the study was {study['status']}; {resume}")
        raise typer.Exit((stop and stop.exit_code) or FAILED)
    if study["recommendation"]["state"] not in _ANSWERED:
        raise typer.Exit(UNDECIDED)
