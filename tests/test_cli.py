"""The command line with real processes and tiny trainings."""

import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import forks
import pytest
from commands import (
    TINY,
    Finished,
    Up,
    assert_one_line,
    find_processes,
    find_workers,
    make_environment,
    run,
    running_up,
    wait_for,
)
from typer.testing import CliRunner

from server.api.queries import MAX_PAGE_SIZE
from server.cli import arguments
from server.cli.main import app
from server.cli.quickstart import DECIDING_COMMAND
from server.models.options import BuiltInOption

COMMANDS = sorted(command.callback.__name__ for command in app.registered_commands)

RunCommand = Callable[..., Finished]


@pytest.fixture
def run_here(tmp_path: Path) -> RunCommand:
    """Run a command on a data directory of its own, with no server."""

    def run_command(*arguments: str) -> Finished:
        return run(*arguments, LOSSLAB_DATA_DIR=str(tmp_path), LOSSLAB_URL="http://127.0.0.1:9")

    return run_command


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with running_up(tmp_path_factory.mktemp("up")) as up:
        yield up


@pytest.fixture(scope="module")
def job_ids(service: Up) -> list[str]:
    """Jobs of option a and b that have run."""
    ids = []
    for option in "ab":
        done = service.run("submit", "--option", option, *TINY, "--wait", "--json")
        assert done.returncode == 0, done.stderr
        assert "epoch 1/1" in done.stderr
        ids.append(json.loads(done.stdout)["id"])
    return ids


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"])
    assert shown.exit_code == 0
    assert f"Example: losslab {command}" in shown.output


def test_help_imports_nothing_slow() -> None:
    script = "import sys, server.cli; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"fastapi", "sqlmodel", "httpx", "matplotlib", "numpy", "torch"} & set(loaded)


def test_as_many_jobs_are_listed_as_a_page_of_the_api_has() -> None:
    assert arguments.MAX_JOBS == MAX_PAGE_SIZE


@pytest.mark.parametrize("command", ["list", "add", "delete"])
def test_help_of_a_command_for_options_has_an_example(command: str) -> None:
    shown = CliRunner().invoke(app, ["option", command, "--help"])
    assert shown.exit_code == 0
    assert f"Example: losslab option {command}" in shown.output


def test_unknown_option_is_answered_with_those_there_are(tmp_path: Path) -> None:
    # The command as it is installed; the other tests' processes are forks.
    losslab = Path(sys.executable).with_name("losslab")
    done = subprocess.run(
        [losslab, "train", "--option", "d"],
        env=make_environment(LOSSLAB_DATA_DIR=str(tmp_path)),
        capture_output=True,
        text=True,
        check=False,
    )
    allowed = ", ".join(BuiltInOption)
    assert_one_line(done, code=2, words=f"there is no option 'd'; allowed are {allowed}")
    assert find_processes(tmp_path) == []


def test_train_ends_with_pictures_log_and_verdict(run_here: RunCommand, tmp_path: Path) -> None:
    log = tmp_path / "option_b_test.log"
    done = run_here(
        "train", "--option", "b", "--quick-test", "--no-wandb", *TINY, "--log", str(log)
    )
    assert done.returncode == 0, done.stderr
    assert "Verdict: " in done.stdout
    assert "not_mode_collapsed" in done.stdout
    assert str(log) in done.stdout
    assert "[VISUALIZATION] Saved: reconstructions_epoch_1.png" in log.read_text()
    pictures = re.search(r"Pictures\s+(\S+)", done.stdout)
    assert (Path(pictures[1]) / "reconstructions_best.png").read_bytes().startswith(b"\x89PNG")
    assert "epoch 1/1" in done.stderr
    assert find_processes(tmp_path) == []


def test_train_prints_json_alone(run_here: RunCommand) -> None:
    done = run_here("train", "--option", "a", *TINY, "--set", "beta_schedule=constant", "--json")
    answer = json.loads(done.stdout)
    assert answer["job"]["config"]["beta_schedule"] == "constant"
    assert answer["verdict"]["job_id"] == answer["job"]["id"]


def test_interrupted_train_cancels_its_job(tmp_path: Path) -> None:
    stdout, stderr = tmp_path / "stdout", tmp_path / "stderr"
    arguments = ["--option", "b", "--num-samples", "1000", "--epochs", "1000", "--json"]
    environment = make_environment(LOSSLAB_DATA_DIR=str(tmp_path))
    with (
        stdout.open("w") as output,
        stderr.open("w") as log,
        forks.start(
            "losslab", "train", *arguments, environment=environment, stdout=output, stderr=log
        ) as process,
    ):
        wait_for(lambda: "epoch 1/1000" in stderr.read_text() or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=40) == 130
    answer = json.loads(stdout.read_text())
    assert answer["job"]["status"] == "cancelled"
    assert find_processes(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "nowhere"], "there is no data set 'nowhere'"),
        (["--data", "../x"], "dataset"),
        (["--epochs", "-1"], "epochs"),
        (["--latent-dim", "0"], "latent_dim"),
        # Nothing follows: the seed of the data has no error of its own.
        (["--seed", "-1"], "Error: seed: Input should be greater than or equal to 0, not -1\n"),
        (["--set", "wrong=1"], "wrong"),
        (["--log", "/nowhere/at/all.log"], "/nowhere/at"),
        (["--wandb-project", "study"], "wandb is not installed"),
    ],
)
def test_train_refuses_bad_input(run_here: RunCommand, arguments: list[str], words: str) -> None:
    assert_one_line(run_here("train", "--option", "b", *arguments), code=2, words=words)


def test_job_that_fails_is_explained(run_here: RunCommand, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("in the way")
    done = run_here("train", "--option", "b", *TINY)
    assert done.returncode == 1
    assert "Error: the job's files cannot be read or written: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["submit", "--option", "b", "--set", "novalue"], "KEY=VALUE"),
        (["submit", "--option", "b", "--set", "=1"], "KEY=VALUE"),
        (["submit", "--option", "b", "--set", "option=a"], "option"),
        (["submit", "--option", "b", "--set", "beta=NaN"], "beta must be a finite number"),
        (["train", "--option", "b", "--learning-rate", "inf"], "learning_rate must be a finite"),
        (["show", ""], "it is empty"),
        (["option", "delete", ""], "it is empty"),
        (["option", "add", "x", "--base", "b", "--set", "beta"], "KEY=VALUE"),
        (["compare", "--options", "a,b", "--report", "out.pdf"], ".html, .md or .png"),
        (["compare", "--options", "a,b", "--report", "/nowhere/out.html"], "no folder /nowhere"),
    ],
)
def test_arguments_are_checked_before_anything_is_asked(
    run_here: RunCommand, command: list[str], words: str
) -> None:
    done = run_here(*command)
    assert done.returncode == 2
    assert words in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "command", [["jobs"], ["show", "x"], ["submit", "--option", "b"], ["option", "list"]]
)
def test_silent_server_is_one_line(run_here: RunCommand, command: list[str]) -> None:
    assert_one_line(run_here(*command), code=1, words="losslab up")


def test_jobs_are_listed(service: Up, job_ids: list[str]) -> None:
    table = service.run("jobs", "--option", "b").stdout
    assert job_ids[1] in table
    assert job_ids[0] not in table
    page = json.loads(service.run("jobs", "--status", "succeeded", "--json").stdout)
    assert [job["id"] for job in page["data"]][-2:] == job_ids[::-1]


def test_job_is_shown_with_its_verdict(service: Up, job_ids: list[str]) -> None:
    shown = service.run("show", job_ids[0]).stdout
    assert "succeeded" in shown
    assert "loss_decreases" in shown
    answer = json.loads(service.run("show", job_ids[0], "--json").stdout)
    assert len(answer["metrics"]["data"]) == 1


def test_jobs_are_compared(service: Up, job_ids: list[str], tmp_path: Path) -> None:
    report = tmp_path / "out.html"
    done = service.run("compare", "--options", "a,b", "--report", str(report))
    assert done.returncode == 0, done.stderr
    assert all(job_id in done.stdout for job_id in job_ids)
    assert report.read_text().lstrip().lower().startswith("<!doctype html")
    comparison = json.loads(service.run("compare", *job_ids, "--json").stdout)
    assert sorted(comparison["ranking"]) == sorted(job_ids)


def test_name_is_no_markup(service: Up) -> None:
    done = service.run("submit", "--option", "b", *TINY, "--name", "[bold]x[/bold] [/oops]")
    assert "[bold]x[/bold] [/oops]" in done.stdout
    assert "[bold]x[/bold] [/oops]" in service.run("jobs").stdout


def test_queued_job_is_cancelled(service: Up) -> None:
    submitted = service.run(
        "submit", "--option", "a", "--num-samples", "1000", "-m", "study=x", "--json"
    )
    job = json.loads(submitted.stdout)
    assert job["metadata"] == {"study": "x"}
    cancelled = service.run("cancel", job["id"], "--json")
    assert cancelled.returncode == 0, cancelled.stderr
    assert json.loads(cancelled.stdout)["id"] == job["id"]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["show", "nothing"], "nothing"),
        (["cancel", "000000000000"], "000000000000"),
        (["compare", "000000000000", "111111111111"], "000000000000"),
        (["option", "add", "a", "--base", "b"], "option a is built in"),
        (["option", "delete", "b"], "option b is built in"),
        (["option", "delete", "nothing"], "there is no option 'nothing'"),
    ],
)
def test_refusal_is_one_line(service: Up, command: list[str], words: str) -> None:
    assert_one_line(service.run(*command), code=1, words=words)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["submit", "--option", "b", "--epochs", "-1"], "epochs"),
        (["submit", "--option", "b", "--data", "nowhere"], "nowhere"),
        (["study", "b", "--grid", "beta=1,1.0"], "the same configuration"),
        (["study", "b", "--threshold", "foo=0.9"], "foo"),
        (["study", "b", "--max-seeds", "3"], "max_seeds"),
        (["option", "add", "x", "--base", "b", "--set", "betta=1"], "config.betta: unknown field"),
        (["option", "add", "..", "--base", "b"], "name"),
    ],
)
def test_value_that_the_service_refuses_is_bad_input(
    service: Up, command: list[str], words: str
) -> None:
    assert_one_line(service.run(*command), code=2, words=words)


@pytest.mark.parametrize(
    "command",
    [
        ["submit", "--option", "d"],
        ["jobs", "--option", "d"],
        ["compare", "--options", "a,d"],
        ["option", "add", "x", "--base", "d"],
    ],
)
def test_option_that_the_server_does_not_know_is_bad_input(service: Up, command: list[str]) -> None:
    words = f"there is no option 'd'; allowed are {', '.join(BuiltInOption)}"
    assert_one_line(service.run(*command), code=2, words=words)


def test_own_option_is_added_used_and_deleted(service: Up) -> None:
    def ask(*arguments: str) -> str:
        done = service.run(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    settings = ["--set", "free_bits=0.1", "--set", "beta_schedule=constant"]
    add = ["option", "add", "b_soft", "--base", "b", *settings, "--summary", "b with [bold]bits"]
    assert "beta_schedule=constant  free_bits=0.1" in ask(*add)
    assert json.loads(ask(*add, "--json"))["config"]["class_weighting"] == "sqrt_inverse"
    listed = ask("option", "list")
    assert all(words in listed for words in ("b_soft", "free_bits=0.1", "b with [bold]bits"))

    submitted = json.loads(ask("submit", "--option", "b_soft", *TINY, "--wait", "--json"))
    local = ["train", "--option", "b_soft", *TINY, "--json"]
    trained = run(*local, LOSSLAB_DATA_DIR=str(service.data_dir))
    ids = [submitted["id"], json.loads(trained.stdout)["job"]["id"]]
    page = json.loads(ask("jobs", "--option", "b_soft", "--json"))
    assert [job["id"] for job in page["data"]] == ids[::-1]
    assert {job["config"]["free_bits"] for job in page["data"]} == {0.1}
    assert ids[1] in ask("compare", "--options", "b_soft")
    options = json.loads(ask("option", "list", "--json"))["data"]
    assert [option["num_jobs"] for option in options if option["name"] == "b_soft"] == [2]

    assert ask("option", "delete", "b_soft") == "Option b_soft is deleted.\n"
    assert ids[0] in ask("jobs", "--option", "b_soft")


def test_train_keeps_its_job_from_the_workers_on_the_same_data_directory(
    service: Up, tmp_path: Path
) -> None:
    log = tmp_path / "train.log"
    arguments = ["train", "--option", "a", *TINY, "--log", str(log), "--json"]
    done = run(*arguments, LOSSLAB_DATA_DIR=str(service.data_dir))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["job"]["attempt"] == 1
    # Its own worker writes its own log.
    assert "[JOB] succeeded" in log.read_text()


def test_taken_port_is_one_line_and_leaves_nothing(run_here: RunCommand, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_one_line(run_here("up", "--port", str(port)), code=1, words=f"port {port}")
    assert find_processes(tmp_path) == []


@pytest.mark.parametrize("command", ["up", "train", "worker"])
def test_data_directory_that_cannot_be_one_is_one_line(
    run_here: RunCommand, tmp_path: Path, command: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    needed = ["--option", "b"] if command == "train" else []
    done = run_here(command, *needed, "--data-dir", str(tmp_path / "file"))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "a file is in the place of a folder" in done.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "example.org", "::"])
def test_open_address_is_refused(run_here: RunCommand, host: str) -> None:
    assert_one_line(run_here("serve", "--host", host), code=1, words="without a token")


def test_dead_worker_is_started_again(tmp_path: Path) -> None:
    with running_up(tmp_path) as up:
        [first] = wait_for(lambda: find_workers(up))
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: [pid for pid in find_workers(up) if pid != first])
        assert f"worker process {first} ended by itself" in up.output
        up.process.terminate()
        assert up.process.wait(timeout=40) == 0
    assert find_processes(tmp_path) == []


def test_killed_up_takes_its_worker_along(tmp_path: Path) -> None:
    with running_up(tmp_path) as up:
        wait_for(lambda: "waits for jobs" in up.output)
        up.process.kill()
        up.process.wait(timeout=10)
        wait_for(lambda: not find_processes(tmp_path))


def test_quickstart_compares_the_options(run_here: RunCommand, tmp_path: Path) -> None:
    done = run_here("quickstart", "--num-samples", "300", "--seeds", "2")
    assert done.returncode == 0, done.stderr
    assert "6 of 6 jobs" in done.stderr
    assert "Decision: " in done.stdout
    assert "2 of 2 is a rate between 0.34 and 1 (95 % interval)" in done.stdout
    assert "So few cannot tell which option is better" in done.stdout
    assert DECIDING_COMMAND in done.stdout
    report = tmp_path / "quickstart-report.html"
    assert str(report) in done.stdout
    assert report.stat().st_size > 1000
    pictures = re.findall(r"Option [abc]\s+(\S+)", done.stdout)
    assert len([path for path in pictures if Path(path).is_file()]) == 3
    assert find_processes(tmp_path) == []


def test_interrupted_quickstart_cancels_its_study(tmp_path: Path) -> None:
    stdout, stderr = tmp_path / "stdout", tmp_path / "stderr"
    environment = make_environment(LOSSLAB_DATA_DIR=str(tmp_path))
    with (
        stdout.open("w") as output,
        stderr.open("w") as log,
        forks.start(
            "losslab", "quickstart", environment=environment, stdout=output, stderr=log
        ) as process,
    ):
        wait_for(lambda: "running" in stderr.read_text() or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=40) == 130
    with closing(sqlite3.connect(tmp_path / "losslab.db")) as database:
        rows = database.execute("SELECT status, count(*) FROM job GROUP BY status").fetchall()
    assert rows == [("cancelled", 3)]
    assert "the study was cancelled" in stderr.read_text()
    assert "Traceback" not in stderr.read_text()
    assert find_processes(tmp_path) == []


def test_command_that_quickstart_names_is_one(run_here: RunCommand) -> None:
    _, *arguments = DECIDING_COMMAND.split()
    plan = json.loads(run_here(*arguments, "--dry-run", "--json").stdout)
    assert (plan["num_jobs"], plan["max_num_jobs"]) == (15, 120)
