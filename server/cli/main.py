"""The `losslab` command.

Slow imports (fastapi, sqlmodel, httpx) are inside the functions that need them, so that `--help`
answers at once; each such line has `noqa: PLC0415`.
"""

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.text import Text

from server.cli import arguments as arg
from server.cli import data as data_commands
from server.cli import local, options, processes, studies, views
from server.cli.connections import (
    open_client,
    read_private_settings,
    read_settings,
    read_worker_settings,
)
from server.cli.quickstart import run_quickstart
from server.cli.reporting import (
    check_report,
    console,
    describe_error,
    error_console,
    print_answer,
    print_error,
    print_json,
    print_paths,
    remember,
    report_errors,
    save_report,
)
from server.cli.terminal import CommandLine
from server.errors import FAILED, INTERRUPTED

if TYPE_CHECKING:
    from server.client import LosslabClient, ReportFormat
    from server.settings import Settings

LAST_EPOCHS_SHOWN: Final = 10
_REPORT_FORMATS: Final[dict[str, "ReportFormat"]] = {".html": "html", ".md": "md", ".png": "curves"}

Json = dict[str, Any]

app = CommandLine(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train β-VAEs on ARC grids under three losses and see which escapes mode collapse.",
    epilog="Example: losslab quickstart",
)
app.add_typer(studies.app, name="study")
app.add_typer(options.app, name="option")
app.add_typer(data_commands.app, name="data")


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415

        try:  # its metadata are enough: to import torch takes seconds
            torch = f"torch {version('torch')}"
        except PackageNotFoundError:
            torch = "no torch"
        typer.echo(f"losslab {version('losslab')}, Python {platform.python_version()}, {torch}")
        raise typer.Exit


@app.callback()
def _read_global_options(
    _version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            callback=_print_version,
            help="Show the versions of losslab, Python and torch, and exit.",
        ),
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: losslab up --workers 2")
def up(
    host: arg.Host = None,
    port: arg.Port = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Worker processes. Default: LOSSLAB_NUM_WORKERS, else 1."),
    ] = None,
    data_dir: arg.DataDir = None,
) -> None:
    """Run the server and its workers until Ctrl-C, which stops all of them."""
    settings = read_settings(host=host, port=port, data_dir=data_dir)
    _run_service(settings, num_workers=settings.num_workers if workers is None else workers)


@app.command(epilog="Example: losslab serve --port 8080")
def serve(host: arg.Host = None, port: arg.Port = None, data_dir: arg.DataDir = None) -> None:
    """Run only the server; workers may run elsewhere."""
    _run_service(read_settings(host=host, port=port, data_dir=data_dir), num_workers=0)


@app.command(epilog="Example: losslab worker --drain")
def worker(
    drain: Annotated[bool, typer.Option("--drain", help="End when no job is queued.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Only check whether a worker of this host is alive.")
    ] = False,
    data_dir: arg.DataDir = None,
) -> None:
    """Run one worker until Ctrl-C; its job then returns to the queue."""
    if check:
        with report_errors():
            settings = read_worker_settings(data_dir=data_dir)
            raise typer.Exit(not processes.count_live_workers(settings))
    with report_errors():
        settings = read_worker_settings(data_dir=data_dir)
        processes.become_worker(settings, *(["--drain"] if drain else []))


@app.command(epilog="Example: losslab train --option b --quick-test --no-wandb --log b.log")
def train(
    option: arg.LossOption,
    quick_test: arg.QuickTest = False,
    name: arg.JobName = None,
    data: arg.Data = None,
    epochs: arg.Epochs = None,
    num_samples: arg.NumSamples = None,
    batch_size: arg.BatchSize = None,
    learning_rate: arg.LearningRate = None,
    latent_dim: arg.LatentDim = None,
    beta: arg.Beta = None,
    seed: arg.Seed = None,
    set_keys: arg.SetKeys = None,
    log: arg.Log = None,
    no_wandb: arg.NoWandb = False,
    wandb_project: arg.WandbProject = None,
    data_dir: arg.DataDir = None,
    as_json: arg.AsJson = False,
) -> None:
    """Train one job on this machine, without a server, in a process of its own."""
    request = {"option": option, "quick_test": quick_test, "name": name} | arg.collect_overrides(
        set_keys, dataset=data, epochs=epochs, num_samples=num_samples, batch_size=batch_size,
        learning_rate=learning_rate, latent_dim=latent_dim, beta=beta, seed=seed,
    )  # fmt: skip
    settings = read_worker_settings(
        data_dir=data_dir, wandb_project="" if no_wandb else wandb_project
    )
    stop = processes.StopSignal()
    with report_errors(), views.JobProgress(error_console) as progress:
        answer = local.train(settings, request, log=log, stop=stop, on_update=progress.update)
    remember(f"job {answer['job']['id']} ended: {answer['job']['status']}")
    if as_json:
        print_json(answer)
    else:
        _print_run(answer, settings=settings, log=log)
    _exit_unless_succeeded(answer["job"], stop=stop)


@app.command(epilog="Example: losslab submit --option b --quick-test --wait")
def submit(
    option: arg.LossOption,
    quick_test: arg.QuickTest = False,
    name: arg.JobName = None,
    data: arg.Data = None,
    epochs: arg.Epochs = None,
    num_samples: arg.NumSamples = None,
    batch_size: arg.BatchSize = None,
    learning_rate: arg.LearningRate = None,
    latent_dim: arg.LatentDim = None,
    beta: arg.Beta = None,
    seed: arg.Seed = None,
    set_keys: arg.SetKeys = None,
    metadata: arg.Metadata = None,
    wait: arg.Wait = False,
    as_json: arg.AsJson = False,
) -> None:
    """Post a job to the server at LOSSLAB_URL."""
    overrides = arg.collect_overrides(
        set_keys, dataset=data, epochs=epochs, num_samples=num_samples, batch_size=batch_size,
        learning_rate=learning_rate, latent_dim=latent_dim, beta=beta, seed=seed,
        name=name, metadata=arg.parse_pairs(metadata) or None,
    )  # fmt: skip
    with open_client() as client:
        job = client.create_job(option, quick_test, **overrides)
        remember(f"job {job['id']} was posted")
        if wait:
            job = _wait(client, job["id"])
    print_answer(job, as_json=as_json, view=views.job_view)
    if not as_json:
        console.print(f"losslab show {job['id']}", style="dim", highlight=False)
    if job["status"] == "paused":
        print_error(f"the job was paused; losslab resume {job['id']} continues it")
    if wait:
        _exit_unless_succeeded(job)


@app.command(epilog="Example: losslab jobs --status running")
def jobs(
    status: Annotated[str | None, typer.Option(help="Only jobs with this status.")] = None,
    option: Annotated[str | None, typer.Option(help="Only jobs with this option.")] = None,
    name: Annotated[str | None, typer.Option(help="Only jobs with this name.")] = None,
    limit: Annotated[
        int, typer.Option(min=1, max=arg.MAX_JOBS, help="Maximum number of jobs.")
    ] = 20,
    as_json: arg.AsJson = False,
) -> None:
    """List jobs, newest first."""
    with open_client() as client:
        page = client.list_jobs(status=status, option=option, name=name, limit=limit)
    print_answer(page, as_json=as_json, view=views.jobs_table)


@app.command(epilog="Example: losslab show 3f2a9c51d07e")
def show(job_id: arg.JobId, criteria: arg.Criteria = None, as_json: arg.AsJson = False) -> None:
    """Show a job, its last epochs and its verdict."""
    with open_client() as client:
        job = client.read_job(job_id)
        metrics = client.read_metrics(job_id)
        verdict = client.read_verdict(job_id, criteria)
    if as_json:
        print_json({"job": job, "metrics": metrics, "verdict": verdict})
        return
    console.print(views.job_view(job))
    if metrics["data"]:
        console.print(views.epochs_table(metrics["data"][-LAST_EPOCHS_SHOWN:]))
        console.print(views.verdict_view(verdict))


@app.command(epilog="Example: losslab cancel 3f2a9c51d07e")
def cancel(job_id: arg.JobId, as_json: arg.AsJson = False) -> None:
    """Cancel a job: a queued one at once, a running one at its next step."""
    with open_client() as client:
        job = client.cancel_job(job_id)
        remember(f"job {job_id} was cancelled")
    print_answer(job, as_json=as_json, view=views.job_view)


@app.command(epilog="Example: losslab pause 3f2a9c51d07e")
def pause(job_id: arg.JobId, as_json: arg.AsJson = False) -> None:
    """Pause a job: a queued one at once, a running one at its next step."""
    with open_client() as client:
        job = client.pause_job(job_id)
        remember(f"job {job_id} was paused")
    print_answer(job, as_json=as_json, view=views.job_view)


@app.command(epilog="Example: losslab resume 3f2a9c51d07e --epochs 100")
def resume(job_id: arg.JobId, epochs: arg.Epochs = None, as_json: arg.AsJson = False) -> None:
    """Continue a paused, failed or cancelled job; a succeeded one needs more --epochs."""
    with open_client() as client:
        job = client.resume_job(job_id, epochs)
        remember(f"job {job_id} was resumed")
    print_answer(job, as_json=as_json, view=views.job_view)


@app.command(epilog="Example: losslab compare --options a,b,c --report out.html")
def compare(
    job_ids: Annotated[list[str] | None, typer.Argument(metavar="ID...", help="Job ids.")] = None,
    options: Annotated[
        str | None, typer.Option(help="The newest succeeded job of each option, as in a,b,c.")
    ] = None,
    criteria: arg.Criteria = None,
    report: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="Save the report: .html, .md or .png.",
            callback=arg.expand_path,
        ),
    ] = None,
    as_json: arg.AsJson = False,
) -> None:
    """Compare jobs: verdicts, ranking and a recommendation."""
    if bool(job_ids) == bool(options):
        raise typer.BadParameter("name jobs by their ids, or options with --options")
    names = [name.strip() for name in options.split(",")] if options else None
    if report is not None:
        check_report(report, suffixes=_REPORT_FORMATS)
    with open_client() as client:
        comparison = client.compare(job_ids, names, criteria=criteria)
        if report is not None:
            form = _REPORT_FORMATS[report.suffix]
            document = client.download_report(job_ids, names, criteria=criteria, format=form)
            save_report(report, document)
    print_answer(comparison, as_json=as_json, view=views.comparison_view)
    if report is not None:
        error_console.print(Text(f"Report: {report}"), soft_wrap=True)


@app.command(epilog="Example: losslab token alice --read-only")
def token(
    name: Annotated[str, typer.Argument(help="The token's name, shown in the server's log.")],
    read_only: Annotated[
        bool, typer.Option("--read-only", help="The token cannot change anything.")
    ] = False,
) -> None:
    """Make an API token: a secret for the client and an entry for the server's settings."""
    from server.tokens import ApiToken, TokenScope, new_secret  # noqa: PLC0415

    secret, scope = new_secret(), TokenScope.read if read_only else TokenScope.full
    with report_errors():
        entry = ApiToken.of(secret, name=name, scope=scope)
    console.print(f"client  LOSSLAB_API_TOKEN={secret}", soft_wrap=True, highlight=False)
    console.print(f"server  LOSSLAB_API_TOKENS={entry}", soft_wrap=True, highlight=False)


@app.command(epilog="Example: losslab quickstart --seeds 5")
def quickstart(
    num_samples: Annotated[
        int | None,
        typer.Option(help="Grids per job. Default: 100,000 on a GPU, else 80,000."),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, max=100, help="Seeds of each option. Default: 3 on a GPU, else 1."),
    ] = None,
    data_dir: arg.DataDir = None,
    keep_serving: Annotated[
        bool, typer.Option("--keep-serving", help="Keep the server running until Ctrl-C.")
    ] = False,
) -> None:
    """Compare options a, b and c in a short study; needs no running server."""
    settings = read_private_settings(data_dir=data_dir)
    run_quickstart(settings, num_seeds=seeds, num_samples=num_samples, keep_serving=keep_serving)


def _run_service(settings: "Settings", *, num_workers: int) -> None:
    from server.logs import configure_logging  # noqa: PLC0415

    configure_logging(as_json=settings.json_logs)
    with (
        report_errors(),
        processes.StopSignal() as stop,
        processes.Service(settings, num_workers=num_workers, stop=stop) as service,
    ):
        if not settings.json_logs:  # JSON logs share stdout, which then has only JSON objects
            welcome = views.welcome_text(
                service.url,
                data_dir=settings.data_dir,
                num_workers=num_workers,
                needs_token=bool(settings.tokens),
            )
            try:
                console.print(welcome, soft_wrap=True)
            except OSError as error:  # the service goes on without its words
                print_error(describe_error(error))
        service.run()


def _wait(client: "LosslabClient", job_id: str) -> Json:
    try:
        with views.JobProgress(error_console) as progress:
            return client.wait(job_id, on_update=progress.update)
    except KeyboardInterrupt:
        print_error(f"stopped waiting; job {job_id} continues (losslab cancel {job_id} stops it)")
        raise typer.Exit(INTERRUPTED) from None


def _exit_unless_succeeded(job: Json, *, stop: processes.StopSignal | None = None) -> None:
    if job["status"] != "succeeded":
        raise typer.Exit((stop and stop.exit_code) or FAILED)


def _print_run(answer: Json, *, settings: "Settings", log: Path | None) -> None:
    job, run_dir = answer["job"], settings.runs_dir / answer["job"]["id"]
    console.print(views.job_view(job))
    if job["epochs_completed"]:
        console.print(views.verdict_view(answer["verdict"]))
        print_paths({"pictures": run_dir / "checkpoints"})
    print_paths({"log": log or run_dir / "job.log"})
    if job["status"] != "succeeded":
        reason = job["error"]["message"] if job["error"] else f"the job was {job['status']}"
        print_error(reason)
