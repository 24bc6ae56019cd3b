"""`losslab study` and the example script with real processes and tiny trainings."""

import io
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import forks
import numpy as np
import pytest
from commands import (
    TINY,
    Finished,
    Up,
    assert_one_line,
    find_processes,
    make_environment,
    run,
    running_up,
    wait_for,
)
from rich.console import Console
from typer.testing import CliRunner

from server.api.study_requests import DEFAULT_NUM_SEEDS
from server.cli import studies
from server.cli.main import app
from server.cli.study_views import StudyProgress, studies_table
from server.errors import BAD_INPUT, FAILED

COMMANDS = sorted(command.name or command.callback.__name__ for command in
                  studies.app.registered_commands if command.callback)  # fmt: skip
EXAMPLE = Path(__file__).parent.parent / "examples" / "compare_losses.py"
#: By these no criterion fails but that of the KL, where a large β holds it at nothing.
LOOSE = [
    part
    for limit in ("min_accuracy=0", "max_accuracy=1", "min_foreground_recall=0",
                  "max_all_black_share=1", "min_kl_per_dimension=0.00001", "loss_tolerance=10",
                  "max_accuracy_change=1", "max_loss_rise=10", "max_spike_ratio=1000")
    for part in ("--threshold", limit)
]  # fmt: skip
#: The second arm never passes, and the first one does.
DECIDING = [
    "study", "b", "--grid", "beta=0,1000", "--epochs", "2", "--batch-size", "16", *LOOSE
]  # fmt: skip
UNKNOWN_ID = "0" * 12
LONG = ["--num-samples", "1000", "--epochs", "1000"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with running_up(tmp_path_factory.mktemp("up")) as up:
        yield up


@pytest.fixture(scope="module")
def collapsed(service: Up) -> Finished:
    """A study in which no arm passes, as the command printed it."""
    return service.run("study", "a", "b", "--seeds", "2", *TINY, "--name", "[bold]x [/oops]")


@pytest.fixture(scope="module")
def study_id(collapsed: Finished) -> str:
    match = re.search(r"Study ([0-9a-f]{12})", collapsed.stdout)
    assert match is not None, collapsed.stderr
    return match[1]


@pytest.fixture(scope="module")
def data(service: Up) -> str:
    """A data set without background, whose reconstructions are never all black."""
    grids = np.random.default_rng(0).integers(1, 3, size=(200, 8, 8), dtype=np.uint8)
    folder = service.data_dir / "datasets"
    folder.mkdir(exist_ok=True)
    np.savez(folder / "full.npz", images=grids)
    return "full"


def run_nowhere(*arguments: str) -> Finished:
    """Run a command that no server answers."""
    return run(*arguments, LOSSLAB_URL="http://127.0.0.1:9")


def read_study(service: Up, study_id: str) -> dict[str, object]:
    study: dict[str, object] = json.loads(service.run("study", "show", study_id, "--json").stdout)
    return study


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    shown = CliRunner().invoke(app, ["study", command, "--help"])
    assert shown.exit_code == 0
    assert f"Example: losslab study {command}" in shown.output


def test_default_number_of_seeds_is_that_of_the_api() -> None:
    assert studies.DEFAULT_NUM_SEEDS == DEFAULT_NUM_SEEDS


def test_study_in_which_no_arm_passes_ends_with_its_own_code(collapsed: Finished) -> None:
    assert collapsed.returncode == 3, collapsed.stderr
    assert "0.00 to 0.66" in collapsed.stdout
    assert "not_mode_collapsed" in collapsed.stdout
    assert "Decision: no arm passed once: a passed 0 of 2 and b passed 0 of 2." in collapsed.stdout
    assert "[bold]x [/oops]" in collapsed.stdout
    assert "succeeded  4 of 4 jobs  a 0/2  b 0/2" in collapsed.stderr


def test_study_is_shown_and_reported_by_the_criteria_that_are_given(
    service: Up, study_id: str, tmp_path: Path
) -> None:
    shown = service.run("study", "show", study_id, "--criteria", "evidence", "--json")
    study = json.loads(shown.stdout)
    assert study["criteria_set"] == "evidence"
    failed = service.run("study", "show", study_id, "--criteria", "evidence").stdout
    assert "not_mode_collapsed" not in failed
    path = tmp_path / "jobs.csv"
    arguments = ("--criteria", "evidence", "--output", str(path))
    assert service.run("study", "report", study_id, *arguments).returncode == 0
    assert "knows_colours" in path.read_text()
    job_id = study["arms"][0]["jobs"][0]
    verdict = service.run("show", job_id, "--criteria", "evidence").stdout
    assert "(criteria: evidence)" in verdict
    assert "paints_truthfully" in verdict
    compared = service.run("compare", job_id, "--criteria", "evidence", "--json")
    assert json.loads(compared.stdout)["criteria_set"] == "evidence"


@pytest.mark.parametrize("command", [["study", "a"], ["show", "x"], ["compare", "x"]])
def test_unknown_criteria_are_refused_with_those_that_there_are(command: list[str]) -> None:
    done = run_nowhere(*command, "--criteria", "both")
    assert done.returncode == 2
    assert "'spec', 'evidence'" in " ".join(done.stderr.split())


def test_study_that_decides_succeeds(service: Up, data: str) -> None:
    done = service.run(*DECIDING, "--data", data, "--seeds", "5", "--json")
    assert done.returncode == 0, done.stderr
    study = json.loads(done.stdout)
    assert study["recommendation"]["state"] == "decided"
    assert study["recommendation"]["arm"] == "b beta=0"
    assert [arm["state"] for arm in study["arms"]] == ["kept", "ruled_out"]
    waited = service.run("study", "wait", study["id"])
    assert waited.returncode == 0
    assert "recommended" in waited.stdout
    assert "ruled out" in waited.stdout
    assert "kl_per_dimension" in waited.stdout


def test_race_is_waited_for_to_its_end(service: Up, data: str) -> None:
    done = service.run(*DECIDING, "--data", data, "--until-decided", "--max-seeds", "10", "--json")
    assert done.returncode == 0, done.stderr
    study = json.loads(done.stdout)
    assert study["status"] == "succeeded"
    assert study["num_jobs"] == 10, "the first look decided"


def test_plan_queues_nothing(service: Up, study_id: str) -> None:
    before = service.run("study", "list", "--json").stdout
    done = service.run(
        "study", "b", "--grid", "beta=0.5,1", "--seeds", "2", *TINY, "--until-decided", "--dry-run"
    )
    assert done.returncode == 0, done.stderr
    assert "b beta=0.5" in done.stdout
    assert "4: 2 arms, 2 seeds, at most 80" in done.stdout
    assert "5, 10, 20, 40 seeds" in done.stdout
    assert service.run("study", "list", "--json").stdout == before


def test_plan_knows_what_would_be_reused(service: Up, study_id: str) -> None:
    done = service.run("study", "a", "b", *TINY, "--seeds", "3", "--reuse", "--dry-run", "--json")
    plan = json.loads(done.stdout)
    assert (plan["num_jobs"], plan["num_reused"]) == (6, 4)
    assert plan["estimated_seconds"] > 0


@pytest.mark.parametrize(
    ("name", "begin"),
    [("out.html", b"<!doctype html"), ("out.md", b"# "), ("out.png", b"\x89PNG"), ("out.csv", b"")],
)
def test_report_is_saved(
    service: Up, study_id: str, tmp_path: Path, name: str, begin: bytes
) -> None:
    done = service.run("study", "report", study_id, "--output", str(tmp_path / name))
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / name) in done.stderr
    assert (tmp_path / name).read_bytes().lstrip().lower().startswith(begin.lower())


def test_table_of_a_report_has_a_row_for_each_job_or_epoch(service: Up, tmp_path: Path) -> None:
    jobs, epochs = tmp_path / "jobs.csv", tmp_path / "epochs.csv"
    done = service.run("study", "a", "--seeds", "1", "--num-samples", "300", "--epochs", "2",
                       "--report", str(jobs), "--json")  # fmt: skip
    assert done.returncode == 3, done.stderr
    study = json.loads(done.stdout)
    service.run("study", "report", study["id"], "--output", str(epochs), "--per-epoch")
    assert len(jobs.read_text().splitlines()) == 1 + 1
    assert len(epochs.read_text().splitlines()) == 1 + 2


def test_example_compares_losses(service: Up, tmp_path: Path) -> None:
    report = tmp_path / "study.html"
    done = subprocess.run(
        [sys.executable, EXAMPLE, "a", "b", "--seeds", "1", "--num-samples", "300",
         "--report", report],
        env=make_environment(LOSSLAB_URL=service.url),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "0 of 1" in done.stdout
    assert "Decision (none): no arm passed once" in done.stdout
    assert report.stat().st_size > 1000


def test_time_left_is_known_before_a_job_has_ended() -> None:
    console = Console(file=io.StringIO(), width=200)
    study = {"id": "1", "status": "running", "seeds": [0], "arms": [], "num_jobs": 1,
             "seconds_left": None, "until_decided": False}  # fmt: skip
    with StudyProgress(console) as shown:
        shown.update(study | {"progress": 0.1})
        time.sleep(0.1)
        shown.update(study | {"progress": 0.1001, "status": "succeeded"})
    assert isinstance(console.file, io.StringIO)
    first, second = console.file.getvalue().splitlines()
    assert "left" not in first
    assert re.search(r"\d+:\d\d left", second)


def test_studies_are_listed(service: Up, study_id: str) -> None:
    table = service.run("study", "list").stdout
    assert study_id in table
    assert "a, b" in table


def test_study_of_many_arms_takes_few_lines_of_the_list() -> None:
    arms = [f"b beta={number}" for number in range(15)]
    console = Console(file=io.StringIO(), width=80)
    study = {
        "id": "0123456789ab", "name": "many", "status": "queued", "arms": arms,
        "num_seeds": 5, "num_jobs": 75, "progress": 0.0,
    }  # fmt: skip
    console.print(studies_table({"data": [study], "has_more": False}))
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "11" in shown
    assert "beta=4" not in shown
    assert len(shown.splitlines()) < len(arms)


def test_option_may_come_after_a_setting(service: Up) -> None:
    done = service.run("study", "--dry-run", "a", "--json")
    assert [arm["arm"] for arm in json.loads(done.stdout)["arms"]] == ["a"]


def test_study_is_steered_by_its_id(service: Up) -> None:
    started = service.run("study", "a", "--seeds", "1", *LONG, "--no-wait", "-m", "k=v", "--json")
    assert started.returncode == 0, started.stderr
    study = json.loads(started.stdout)
    assert study["metadata"] == {"k": "v"}
    assert service.run("study", "pause", study["id"]).returncode == 0
    wait_for(lambda: read_study(service, study["id"])["status"] == "paused")
    assert "was paused" in service.run("study", "wait", study["id"]).stderr
    assert service.run("study", "resume", study["id"]).returncode == 0
    added = json.loads(service.run("study", "add", study["id"], "--seeds", "2", "--json").stdout)
    assert added["seeds"] == [0, 1, 2]
    assert_one_line(service.run("study", "delete", study["id"]), code=1, words="cancel it")
    assert service.run("study", "cancel", study["id"]).returncode == 0
    waited = service.run("study", "wait", study["id"])
    assert (waited.returncode, "was cancelled" in waited.stderr) == (1, True)
    deleted = service.run("study", "delete", study["id"]).stdout
    assert "3 jobs deleted, 0 kept" in deleted


def test_interrupted_waiting_lets_the_study_go_on(service: Up, tmp_path: Path) -> None:
    stderr = tmp_path / "stderr"
    with (
        stderr.open("w") as log,
        forks.start(
            "losslab", "study", "a", "--seeds", "1", *LONG,
            environment=make_environment(LOSSLAB_URL=service.url), stdout=log, stderr=log,
        ) as process,
    ):  # fmt: skip
        wait_for(lambda: "0 of 1 jobs" in stderr.read_text() or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=40) == 130
    said = re.search(r"losslab study cancel (\w+) stops it", stderr.read_text())
    assert said is not None, stderr.read_text()
    assert "Traceback" not in stderr.read_text()
    assert read_study(service, said[1])["status"] in ("queued", "running")
    assert service.run("study", "cancel", said[1]).returncode == 0


def test_interrupted_local_study_is_cancelled(tmp_path: Path) -> None:
    stdout, stderr = tmp_path / "stdout", tmp_path / "stderr"
    with (
        stdout.open("w") as output,
        stderr.open("w") as log,
        forks.start(
            "losslab", "study", "a", "--seeds", "2", *LONG, "--local", "--workers", "1", "--json",
            environment=make_environment(LOSSLAB_DATA_DIR=str(tmp_path)), stdout=output, stderr=log,
        ) as process,
    ):  # fmt: skip
        wait_for(lambda: "running" in stderr.read_text() or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=40) == 130
    study = json.loads(stdout.read_text())
    assert study["num_by_status"] == {"cancelled": 2}
    assert find_processes(tmp_path) == []


def test_local_study_needs_no_server(tmp_path: Path) -> None:
    done = run_nowhere(
        "study", "a", "--seeds", "1", *TINY, "--local", "--data-dir", str(tmp_path), "--json"
    )
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout)["status"] == "succeeded"
    assert find_processes(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--grid", "beta"], "'beta' is not KEY=VALUE,VALUE"),
        (["--grid", "beta=0.5,,1"], "grid.beta: a value is empty"),
        (["--grid", "beta=NaN"], "grid.beta must be a finite number"),
        (["--grid", "beta=1", "--grid", "beta=2"], "grid.beta is given twice"),
        (["--set", "beta"], "'beta' is not KEY=VALUE"),
        (["--threshold", "min_accuracy=inf", "--set", "beta=Infinity"], "must be a finite number"),
        (["--seeds", "0"], "--seeds"),
        (["--seeds", "101"], "--seeds"),
        (["--workers", "2"], "--workers needs --local"),
        (["--local", "--no-wait"], "--local waits"),
        (["--data-dir", "x"], "--data-dir needs --local"),
        (["--report", "out.pdf"], ".html, .md, .png or .csv"),
        (["--report", "/nowhere/out.html"], "no folder /nowhere"),
        (["--report", "out.html", "--no-wait"], "--no-wait"),
    ],
)
def test_arguments_are_checked_before_anything_is_asked(arguments: list[str], words: str) -> None:
    done = run_nowhere("study", "a", *arguments)
    assert done.returncode == 2
    assert words in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "command",
    [["show", ""], ["add", "x"], ["report", "x"], ["report", "x", "-o", "a.pdf"],
     ["report", "x", "-o", "a.png", "--per-epoch"], ["run"]],
)  # fmt: skip
def test_command_of_a_study_checks_its_arguments(command: list[str]) -> None:
    assert run_nowhere("study", *command).returncode == 2


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["a", "--grid", "wrong=1"], "grid.wrong"),
        (["a", "--grid", "beta=1,x"], "grid.beta.1"),
        (["a", "--set", "seed=1"], "config.seed"),
        (["a", "--threshold", "wrong=1"], "thresholds.wrong"),
        (["a", "--max-seeds", "10"], "max_seeds"),
        (["a", "--data", "nowhere"], "nowhere"),
        (["show", "000000000000"], "000000000000"),
    ],
)
def test_refusal_is_one_line(service: Up, command: list[str], words: str) -> None:
    code = FAILED if words == UNKNOWN_ID else BAD_INPUT
    assert_one_line(service.run("study", *command), code=code, words=words)


def test_unknown_option_is_bad_input(service: Up) -> None:
    assert_one_line(service.run("study", "a", "nonsense"), code=2, words="nonsense")


def test_silent_server_is_one_line() -> None:
    assert_one_line(run_nowhere("study", "a"), code=1, words="losslab up")
