"""The tables of the command line."""

import io
from pathlib import Path

import pytest
import typer
from rich.console import Console, RenderableType

from server.api.schemas import JobPublic, OptionPublic
from server.cli.reporting import report_errors
from server.cli.views import (
    comparison_view,
    job_view,
    jobs_table,
    options_table,
    welcome_text,
)
from server.client import RequestError
from server.jobs.options import BUILT_IN_OPTIONS
from server.models.columns import utc_now
from server.models.configuration import TrainingConfig
from server.models.options import BuiltInOption
from server.models.tables import Job, JobStatus


def show(view: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(view)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("keys", "warning"),
    [
        (["option", "focal_gamma"], ""),
        (["option", "beta", "free_bits"], ""),
        (["option", "num_samples", "seed"], "They also differ in num_samples, seed."),
    ],
)
def test_comparison_of_jobs_that_differ_in_more_than_their_loss_says_so(
    keys: list[str], warning: str
) -> None:
    comparison = {
        "jobs": [], "ranking": [], "recommendation": None, "reason": "",
        "differences": {key: {} for key in keys},
    }  # fmt: skip
    shown = show(comparison_view(comparison))
    assert warning in shown
    assert ("differ" in shown) == bool(warning)


@pytest.mark.parametrize(
    ("request_", "words"),
    [("cancel", "running, is being cancelled"), ("pause", "running, is being paused")],
)
def test_job_that_is_asked_to_stop_says_so(request_: str, words: str) -> None:
    job = Job(
        option=BuiltInOption.b,
        config=TrainingConfig().model_dump(),
        status=JobStatus.running,
        **{f"{request_}_requested_at": utc_now()},
    )
    assert words in show(job_view(JobPublic.of(job).model_dump(mode="json")))


@pytest.mark.parametrize("name", [None, "baseline", "x" * 200, "many words " * 18])
def test_each_job_of_a_list_is_one_line_whatever_its_name(name: str | None) -> None:
    job = Job(option=BuiltInOption.b, config=TrainingConfig().model_dump(), name=name)
    page = {"data": [JobPublic.of(job).model_dump(mode="json")], "has_more": False}
    last_line = show(jobs_table(page)).rstrip().splitlines()[-1]
    assert job.id in last_line
    assert (name or "")[:8] in last_line


@pytest.mark.parametrize("option", ["b_soft", "x" * 64, "b-with-free-bits-" + "and-more" * 5])
def test_long_name_of_an_option_leaves_room_for_the_rest(option: str) -> None:
    job = Job(option=option, config=TrainingConfig().model_dump(), name="baseline")
    page = {"data": [JobPublic.of(job).model_dump(mode="json")], "has_more": False}
    last_line = show(jobs_table(page)).rstrip().splitlines()[-1]
    for words in (job.id, "base", option[:6], "queued", "0/50"):
        assert words in last_line


def test_options_are_listed_with_their_whole_names() -> None:
    built_in = OptionPublic.of(BUILT_IN_OPTIONS["b"], num_jobs=3).model_dump(mode="json")
    own = built_in | {"name": "x" * 64, "base": "z" * 64, "summary": "words " * 80}
    shown = show(options_table({"data": [built_in, own | {"overrides": {"free_bits": 0.1}}]}))
    assert shown.count("x") == shown.count("z") == 64
    assert "free_bits=0.1" in shown
    assert "…" not in shown


def test_refused_token_tells_where_to_set_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), report_errors():
        raise RequestError(401, {"title": "Unauthorized", "detail": "send a token"})
    assert "send a token; set LOSSLAB_API_TOKEN to a valid one" in capsys.readouterr().err


@pytest.mark.parametrize("needs_token", [False, True])
def test_welcome_shows_a_request_that_is_let_in(needs_token: bool) -> None:
    url = "http://127.0.0.1:8000"
    shown = str(welcome_text(url, data_dir=Path("data"), num_workers=1, needs_token=needs_token))
    assert ('-H "Authorization: Bearer $LOSSLAB_API_TOKEN" ' + url in shown) == needs_token
