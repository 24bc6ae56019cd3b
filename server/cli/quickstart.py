"""`losslab quickstart`: options a, b and c in a short study with a server of its own.

Slow imports are inside the functions that need them, as in `server.cli.main`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import typer
from rich.text import Text

from server.cli.connections import open_private_client
from server.cli.local import LOCAL_PRIORITY, choose_num_workers, follow_study, local_service
from server.cli.processes import StopSignal, has_gpu
from server.cli.reporting import (
    console,
    error_console,
    print_error,
    print_paths,
    remember,
    report_errors,
    save_report,
)
from server.cli.study_views import StudyProgress, study_result
from server.errors import FAILED
from server.models.options import BuiltInOption

if TYPE_CHECKING:
    from server.client import LosslabClient
    from server.settings import Settings

Json = dict[str, Any]

OPTIONS: Final = [option.value for option in BuiltInOption]
#: Fewer grids than the quick test has. Smaller jobs, which would leave time for three seeds each,
#: were tried: with 32,000 grids in batches of 32, option b passes in 7 of 10 seeds only.
QUICKSTART_CPU_CONFIG: Final[Json] = {"num_samples": 80_000}
NUM_SEEDS_CPU, NUM_SEEDS_GPU = 1, 3
#: With fewer seeds no option can be ruled out.
_MIN_SEEDS_RULING_OUT: Final = 3
#: The study that can recommend an option, with as many seeds as that takes.
DECIDING_COMMAND: Final = f"losslab study {' '.join(OPTIONS)} --until-decided --quick --local"

_LOG_NAME = "quickstart.log"
_REPORT_NAME = "quickstart-report.html"


def run_quickstart(
    settings: "Settings", *, num_seeds: int | None, num_samples: int | None, keep_serving: bool
) -> None:
    """Train, then print the decision and the pictures. A signal to stop cancels the study.

    Raises typer.Exit unless every job was judged.
    """
    config = choose_config(num_samples=num_samples)
    num_seeds = num_seeds or (NUM_SEEDS_GPU if has_gpu() else NUM_SEEDS_CPU)
    num_workers = settings.chosen_num_workers or _choose_num_workers(num_seeds)
    with (
        report_errors(),
        StopSignal() as stop,
        local_service(settings, num_workers=num_workers, stop=stop, log_name=_LOG_NAME) as service,
        open_private_client(service.url) as client,
    ):
        study = client.create_study(
            OPTIONS, num_seeds=num_seeds, config=config, quick_test=True, name="quickstart",
            priority=LOCAL_PRIORITY,
        )  # fmt: skip
        with StudyProgress(error_console) as progress:
            study = follow_study(service, client, study["id"], progress.update)
        remember(f"study {study['id']} is in {settings.data_dir}")
        if not stop.is_set:
            _print_outcome(study, client=client, settings=settings)
        if keep_serving:
            console.print(Text(f"Serving {service.url} until Ctrl-C."))
            service.run()
    _exit_unless_judged(study, stop=stop)


def choose_config(*, num_samples: int | None) -> Json:
    """The settings of all three options: on a GPU those of the quick test, else cheaper ones."""
    config = {} if has_gpu() else QUICKSTART_CPU_CONFIG
    return config if num_samples is None else config | {"num_samples": num_samples}


def _choose_num_workers(num_seeds: int) -> int:
    """One per core; but three jobs at once end earlier on two cores than two jobs and then one."""
    num_jobs = len(OPTIONS) * num_seeds
    num_workers = choose_num_workers(num_jobs)
    return num_jobs if num_workers == 2 and num_jobs == 3 else num_workers


def describe_claims(study: Json) -> Text:
    """What the study may and may not claim, and the command that can decide."""
    from server.judging.statistics import wilson_interval  # noqa: PLC0415

    num_seeds = len(study["seeds"])
    low, high = wilson_interval(num_seeds, num_seeds) or (0.0, 1.0)
    claim = (
        "an option that is ruled out passes less often than another one. "
        f"At most {study['recommendation']['error']:.0%} of such studies rule out the best option."
    )
    if num_seeds < _MIN_SEEDS_RULING_OUT:
        claim = "what these runs did. So few cannot tell which option is better."
    lines = [
        "",
        f"What this may claim: {claim}",
        f"What it may not: how often an option passes. {num_seeds} of {num_seeds} is a rate "
        f"between {low:.2f} and {high:.0f} (95 % interval), and the jobs were short.",
        f"Whether an option can be recommended: {DECIDING_COMMAND}",
    ]
    return Text("\n".join(lines))


def _print_outcome(study: Json, *, client: "LosslabClient", settings: "Settings") -> None:
    console.print(study_result(study))
    console.print(describe_claims(study), soft_wrap=True)
    report = settings.data_dir / _REPORT_NAME
    save_report(report, client.download_study_report(study["id"]))
    print_paths(_find_pictures(study["arms"], runs_dir=settings.runs_dir) | {"report": report})


def _find_pictures(arms: Sequence[Json], *, runs_dir: Path) -> dict[str, Path]:
    """The picture of each option's median run."""
    return {
        f"option {arm['arm']}": runs_dir
        / arm["median_job_id"]
        / "checkpoints"
        / "reconstructions_best.png"
        for arm in arms
        if arm["median_job_id"]
    }


def _exit_unless_judged(study: Json, *, stop: StopSignal) -> None:
    """Raises typer.Exit if the study was stopped, or lost a job."""
    if any(arm["num_judged"] < len(arm["jobs"]) for arm in study["arms"]):
        if stop.is_set:
            print_error("the study was cancelled; `losslab quickstart` begins a new one")
        raise typer.Exit(stop.exit_code or FAILED)
