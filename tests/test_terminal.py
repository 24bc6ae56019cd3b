"""The command line in odd terminals: letters that are missing, output that is not taken, workers
that end, and a service for others that is configured beside."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import forks
import pytest
from commands import Up, make_environment, run, running_up, wait_for

from server.cli.processes import Process, SupervisedWorker
from server.logs import spell_letters
from server.tokens import ApiToken

COMMAND = "from server.cli.main import app; app()"
FULL = Path("/dev/full")
JOB = ["--option", "b", "--num-samples", "200", "--epochs", "1"]
NEEDS_FULL = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")


def call(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A command in a process of its own, whose output has the encoding of this environment."""
    return subprocess.run(
        [sys.executable, "-P", "-c", COMMAND, *arguments],
        env=make_environment(**environment), capture_output=True, timeout=60, check=False,
    )  # fmt: skip


def call_full(
    *arguments: str, stdout: Path = FULL, stderr: Path | None = None, **environment: str
) -> tuple[int, str]:
    """A command whose output is not taken: its exit code, and what it said on stderr."""
    with tempfile.TemporaryFile("w+") as told, stdout.open("w") as out:
        with (stderr or FULL).open("w") as full:
            process = forks.start(
                "losslab", *arguments, environment=make_environment(**environment),
                stdout=out, stderr=full if stderr else told,
            )  # fmt: skip
            code = process.wait(timeout=60)
        told.seek(0)
        return code, told.read()


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with running_up(tmp_path_factory.mktemp("terminal")) as up:
        done = up.run("submit", *JOB, "--name", "größe β 中文 🙂", "--wait", "--json")
        assert done.returncode == 0, done.stderr
        yield up


# -- letters

ENCODINGS = [
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "cp1252"},
    {"LC_ALL": "C"},
    {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]
#: Runs commands one after the other, since a process takes long to start.
SEVERAL = """
import json, sys
from server.cli.main import app
for arguments, code in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    try:
        app()
    except SystemExit as end:
        assert (end.code or 0) == code, arguments
"""


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_every_encoding_will_do(up: Up, encoding: dict[str, str]) -> None:
    job_id = json.loads(up.run("jobs", "--json").stdout)["data"][0]["id"]
    commands = [(["--help"], 0), (["jobs"], 0), (["show", job_id], 0), (["study", "--help"], 0),
                (["nonsense"], 2)]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-P", "-c", SEVERAL, json.dumps(commands)],
        env=make_environment(LOSSLAB_URL=up.url, **encoding), capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert b"Error" in done.stderr
    assert job_id.encode() in done.stdout


def test_letters_are_spelt_where_they_lack(up: Up) -> None:
    shown = call("jobs", LOSSLAB_URL=up.url, PYTHONIOENCODING="ascii").stdout.decode("ascii")
    assert "beta" in shown
    help_text = call("--help", PYTHONIOENCODING="ascii").stdout.decode("ascii")
    assert "beta-VAEs" in help_text


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-16"])
def test_json_is_whole_in_every_encoding(up: Up, encoding: str) -> None:
    done = call("jobs", "--json", LOSSLAB_URL=up.url, PYTHONIOENCODING=encoding)
    names = [job["name"] for job in json.loads(done.stdout.decode(encoding))["data"]]
    assert "größe β 中文 🙂" in names


def test_file_name_that_is_no_text_is_shown(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe")
    done = call("train", *JOB, f"--log={path}/x.log", LOSSLAB_DATA_DIR=str(tmp_path / "lab"))
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("encoding", ["cp1252"])
def test_services_log_letters_in_every_encoding(tmp_path: Path, encoding: str) -> None:
    """A worker's log of a job with letters in its settings."""
    code = (
        "import logging, sys; from server.logs import configure_logging; "
        "configure_logging(as_json=False); logging.getLogger('x').info('β σ 中文 \\ud800')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONIOENCODING": encoding},
        capture_output=True, check=True,
    )  # fmt: skip
    assert "beta sigma \\u4e2d\\u6587 \\ud800" in done.stdout.decode(encoding)
    assert done.stderr == b""


def test_spelling_twice_changes_nothing() -> None:
    spell_letters()
    spell_letters()
    assert "β±".encode("ascii", errors="losslab.spell") == b"beta+-"


# -- output that is not taken


@NEEDS_FULL
@pytest.mark.parametrize(
    "command",
    [
        *["jobs", "jobs --json", "--help", "study --help", "token anna"],
        *["study list", "option list", "study a b --dry-run"],
    ],
)
def test_full_output_is_one_line_and_a_failure(up: Up, command: str) -> None:
    code, told = call_full(*command.split(), LOSSLAB_URL=up.url)
    assert code == 1
    assert told == "Error: the output cannot be written (no space left on device)\n"


@NEEDS_FULL
@pytest.mark.parametrize("extra", [[], ["--json"], ["--wait"]])
def test_job_that_was_posted_is_named_all_the_same(up: Up, extra: list[str]) -> None:
    before = count_jobs(up)
    code, told = call_full("submit", *JOB, *extra, LOSSLAB_URL=up.url)
    assert code == 1
    posted = re.search(r"\(no space left on device\); job (\w+) was posted$", told)
    assert posted, told
    newest = json.loads(up.run("jobs", "--json").stdout)["data"][0]["id"]
    assert (newest, count_jobs(up)) == (posted[1], before + 1)


@NEEDS_FULL
def test_everything_that_was_done_is_named_all_the_same(up: Up) -> None:
    _, told = call_full("study", "run", "a", "--no-wait", "--seeds", "1", LOSSLAB_URL=up.url)
    (study_id,) = re.findall(r"study (\w+) was posted", told)
    job_id = json.loads(up.run("jobs", "--json").stdout)["data"][0]["id"]
    for arguments, words in (
        (["study", "pause", study_id], f"study {study_id} was paused"),
        (["study", "resume", study_id], f"study {study_id} was resumed"),
        (["study", "add", study_id, "--seeds", "1"], f"study {study_id} has 1 more seeds"),
        (["study", "cancel", study_id], f"study {study_id} was cancelled"),
        (["cancel", job_id], f"job {job_id} was cancelled"),
        (["option", "add", "full", "--base", "b"], "option full was added"),
        (["option", "delete", "full"], "option full was deleted"),
        (["study", "delete", study_id], f"study {study_id} was deleted"),
    ):
        wait_for(lambda: "cancelling" not in up.run("study", "show", study_id).stdout)
        code, told = call_full(*arguments, LOSSLAB_URL=up.url)
        assert code == 1, told
        assert words in told


@NEEDS_FULL
def test_run_of_this_machine_is_named_all_the_same(tmp_path: Path) -> None:
    code, told = call_full("train", *JOB, LOSSLAB_DATA_DIR=str(tmp_path))
    assert code == 1
    assert re.search(r"job \w+ ended: succeeded", told), told
    assert "Traceback" not in told


@NEEDS_FULL
def test_full_stderr_does_not_end_what_is_waited_for(up: Up, tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    arguments = ["submit", *JOB, "--wait", "--json"]
    code, _ = call_full(*arguments, stdout=answer, stderr=FULL, LOSSLAB_URL=up.url)
    assert json.loads(answer.read_text())["status"] == "succeeded"
    assert code == 0


@NEEDS_FULL
def test_full_output_and_stderr_are_a_failure_without_a_word(up: Up) -> None:
    assert call_full("jobs", stderr=FULL, LOSSLAB_URL=up.url)[0] == 1


def test_reader_that_goes_away_is_no_error(up: Up) -> None:
    losslab = f"'{sys.executable}' -P -c '{COMMAND}'"
    shell = f"{losslab} jobs --json | head -1; {losslab} jobs >&-"
    environment = make_environment(LOSSLAB_URL=up.url)
    done = subprocess.run(["sh", "-c", shell], env=environment, capture_output=True, check=False)
    assert done.stdout == b"{\n"
    assert done.stderr == b""


@NEEDS_FULL
def test_service_goes_on_without_its_log(tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    with errors.open("wb") as stderr, FULL.open("wb") as full:
        environment = make_environment(LOSSLAB_DATA_DIR=str(tmp_path / "lab"))
        process = forks.start(
            "losslab", "up", "--port", "0", "--workers", "1",
            environment=environment, stdout=full, stderr=stderr,
        )  # fmt: skip
        try:
            wait_for(lambda: list((tmp_path / "lab").glob("losslab.db")))
            time.sleep(3)
            assert process.poll() is None
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=40)
    lines = errors.read_text().splitlines()
    assert "Traceback" not in errors.read_text()
    assert set(lines) <= {
        "Error: the output cannot be written (no space left on device)",
        "the log cannot be written: No space left on device",
    }
    assert len(lines) <= 4


def count_jobs(up: Up) -> int:
    return len(json.loads(up.run("jobs", "--json", "--limit", "100").stdout)["data"])


# -- workers


@pytest.mark.parametrize(
    ("variable", "arguments", "num_workers"),
    [("2", [], 2), ("3", ["--workers", "0"], 0)],
)
def test_up_starts_as_many_workers_as_were_asked_for(
    tmp_path: Path, variable: str, arguments: list[str], num_workers: int
) -> None:
    log = tmp_path / "log"
    environment = make_environment(
        LOSSLAB_DATA_DIR=str(tmp_path / "lab"), LOSSLAB_NUM_WORKERS=variable
    )
    with log.open("wb") as file:
        process = forks.start(
            "losslab", "up", "--port", "0", *arguments,
            environment=environment, stdout=file, stderr=file,
        )  # fmt: skip
    try:
        url = wait_for(lambda: re.search(r"http://127.0.0.1:\d+", log.read_text()))[0]
        words = {0: "without workers", 1: "1 worker", 2: "2 workers"}
        assert words[num_workers] in log.read_text() or num_workers == 0
        children = list_children(process.pid)
        assert len(children) == num_workers, (url, children)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=40)


def list_children(pid: int) -> list[int]:
    """The workers that a process has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(path.parent.name))
    return found


def end_with(code: int) -> Process:
    process: Process = subprocess.Popen([sys.executable, "-S", "-c", f"raise SystemExit({code})"])
    process.wait()
    return process


def watch(worker: SupervisedWorker, *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not worker.is_given_up:
        worker.check()
        time.sleep(0.02)


@pytest.mark.parametrize(("code", "is_given_up"), [(0, True), (1, False)])
def test_worker_that_ends_without_a_word_is_not_started_for_ever(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: int,
    is_given_up: bool,
) -> None:
    """One that crashes is: its device or database may come back."""
    monkeypatch.setattr("server.cli.processes._SHORTEST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr("server.cli.processes._LONGEST_PAUSE_SECONDS", 0.1)
    starts = []

    def start() -> Process:
        starts.append(time.monotonic())
        return end_with(code)

    worker = SupervisedWorker(start)
    watch(worker, seconds=3)
    assert worker.is_given_up is is_given_up
    assert len(starts) == 3 if is_given_up else len(starts) > 4
    if is_given_up:
        assert "`losslab worker` shows what it says" in caplog.text
        worker.check()
        assert len(starts) == 3


def test_service_whose_workers_all_end_at_once_ends_with_its_reason(tmp_path: Path) -> None:
    """The worker's own module is replaced by one that does nothing, as a broken installation is."""
    code = (
        "import sys; from server.cli import processes; "
        "processes._WORKER_COMMAND = (sys.executable, '-S', '-c', 'pass', '--'); "
        "processes._SHORTEST_PAUSE_SECONDS = 0.1; "
        "sys.argv = ['losslab', 'up', '--port', '0']; from server.cli.main import app; app()"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=make_environment(LOSSLAB_DATA_DIR=str(tmp_path)),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "every worker ends just after its start" in done.stderr


# -- versions


def test_version_is_one_line_with_all_that_support_asks_for() -> None:
    """Torch is not imported for it."""
    code = f"{COMMAND.partition(';')[0]}; import sys, atexit; "
    code += "atexit.register(lambda: print('torch' in sys.modules)); app()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "--version"],
        env=make_environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    python = platform.python_version()
    line = f"losslab {version('losslab')}, Python {python}, torch {version('torch')}"
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{line}\nFalse\n", "")


# -- Ctrl-C


#: Runs a package after Ctrl-C was pressed in the middle of an import.
INTERRUPTED_IMPORT = """
import os, runpy, signal, sys

class Finder:
    def find_spec(name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Finder)
sys.argv = [{package!r}, {argument!r}]
runpy.run_module({package!r}, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("package", "module", "argument"),
    [
        ("server.cli", "typer", "--help"),
        ("server.cli", "server.cli.terminal", "--help"),
        ("server.cli", "server.settings", "serve"),  # imported by the command itself
        ("worker", "torch", "--drain"),
        ("worker", "server.logs", "--drain"),
    ],
)
def test_interrupt_during_an_import_leaves_no_traceback(
    tmp_path: Path, package: str, module: str, argument: str
) -> None:
    code = INTERRUPTED_IMPORT.format(package=package, module=module, argument=argument)
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=make_environment(LOSSLAB_DATA_DIR=str(tmp_path)),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_interrupted_drain_says_by_its_exit_code_that_jobs_may_wait(tmp_path: Path) -> None:
    environment = make_environment(LOSSLAB_DATA_DIR=str(tmp_path))
    long = ["--option", "b", "--num-samples", "1000", "--epochs", "1000"]
    with running_up(tmp_path) as up:  # whose end returns the job to the queue
        assert up.run("submit", *long).returncode == 0
    stderr = tmp_path / "stderr"
    with (
        stderr.open("w") as log,
        forks.start("worker", "--drain", environment=environment, stdout=log, stderr=log) as worker,
    ):
        wait_for(lambda: "epoch" in stderr.read_text().lower() or worker.poll() is not None)
        worker.send_signal(signal.SIGINT)
        assert worker.wait(timeout=40) == 130


# -- a service for others, configured beside


PUBLIC = {
    "LOSSLAB_API_TOKEN": "a-long-and-secret-token",
    "LOSSLAB_API_TOKENS": str(ApiToken.of("x", name="anna")),
    "LOSSLAB_ALLOWED_HOSTS": "lab.example.org",
    "LOSSLAB_PUBLISHED_HOST": "0.0.0.0",
    "LOSSLAB_HOST": "0.0.0.0",
    "LOSSLAB_PORT": "8000",
    "LOSSLAB_ROOT_PATH": "/losslab",
    "LOSSLAB_MAX_QUEUED_JOBS": "1",
    "LOSSLAB_RATE_LIMIT": "1/hour",
    "LOSSLAB_MAX_JOB_SECONDS": "0.001",
    "LOSSLAB_REQUEST_SECONDS": "0.001",
    "LOSSLAB_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/shared",
    "LOSSLAB_URL": "http://127.0.0.1:1/elsewhere",
    "HTTP_PROXY": "socks4://127.0.0.1:1",
}


def test_private_server_runs_whatever_is_set_for_a_service(tmp_path: Path) -> None:
    arguments = ["quickstart", "--num-samples", "200", "--seeds", "1"]
    done = run(*arguments, "--data-dir", str(tmp_path), **PUBLIC)
    assert done.returncode in (0, 3), done.stderr
    assert "Error" not in done.stderr
    assert (tmp_path / "losslab.db").exists()


def test_private_servers_wrong_settings_of_a_service_do_not_stop_it(tmp_path: Path) -> None:
    wrong = {"LOSSLAB_API_TOKEN": "ä", "LOSSLAB_RATE_LIMIT": "x", "LOSSLAB_PORT": "x"}
    arguments = ["study", "a", "--local", "--dry-run"]
    done = run(*arguments, "--data-dir", str(tmp_path), **wrong)
    assert done.returncode == 0, done.stderr
