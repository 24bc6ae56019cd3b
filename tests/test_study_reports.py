"""Reports, curves and tables of a study that was really trained, with hostile names."""

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import pytest
import torch
from conftest import BOTH_DATABASES, LENIENT, TINY, MakeSettings, drain, open_client, problem
from fastapi.testclient import TestClient
from PIL import Image
from sqlalchemy import JSON, Engine, null, select, update
from sqlmodel import col

from server.database.engine import open_database
from server.judging.criteria import CriterionName
from server.judging.groups import GroupMetric
from server.judging.methods import SOURCES
from server.main import create_app
from server.models.epochs import EpochMetrics
from server.texts import escape_markdown

pytestmark = BOTH_DATABASES

#: 200 characters of everything that a format might read as its own.
HOSTILE = (
    '=1+1 <script>alert(1)</script> a|b `c` **d** [e](javascript:f) \u202eevil שלום, "q" $x_{$ '
)
NAME = (HOSTILE + "x" * 200)[:200]
ARM = '@<b>|*x*\u202e_y_,"é'
SMALLEST = TINY | {"num_samples": 100, "epochs": 2, "checkpoint_every": 2}
SEEDS = [0, 1, 2, 3, 4]
Json = dict[str, Any]
Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Trained:
    """A server with a study that has ended, and what it answered: pictures take a second to draw,
    and the study does not change."""

    client: TestClient
    engine: Engine
    study: Json
    answers: dict[str, Any] = field(default_factory=dict)

    def get(self, name: str, **thresholds: float) -> Any:
        key = f"{name} {thresholds}"
        if key not in self.answers:
            answer = self.client.get(f"/studies/{self.study['id']}/{name}", params=thresholds)
            assert answer.status_code == 200, answer.text
            self.answers[key] = answer
        return self.answers[key]

    def read_csv(self, name: str, **thresholds: float) -> Rows:
        text = self.get(name, **thresholds).content.decode("utf-8")
        return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, make_settings: MakeSettings
) -> Iterator[Trained]:
    """Two arms with five seeds; one arm has fewer latent dimensions."""
    settings = make_settings(tmp_path_factory.mktemp("study") / "experiments")
    engine = open_database(settings)
    with open_client(create_app(settings)) as client:
        request = {
            "name": NAME,
            "options": ["a", {"name": ARM, "base": "b", "config": {"latent_dim": 3}}],
            "seeds": SEEDS,
            "config": SMALLEST,
            "thresholds": LENIENT,
        }
        study_id = client.post("/studies", json=request).raise_for_status().json()["id"]
        drain(settings, engine)
        study = client.get(f"/studies/{study_id}").json()
        assert study["status"] == "succeeded"
        yield Trained(client, engine, study)
    engine.dispose()


@pytest.fixture(scope="module")
def queued(trained: Trained) -> Json:
    """A study that no worker has begun."""
    request = {"options": ["b"], "num_seeds": 2, "config": TINY, "name": "=waits"}
    study: Json = trained.client.post("/studies", json=request).raise_for_status().json()
    return study


# -- reports


def test_report_sets_what_is_known_beside_what_is_painted(trained: Trained) -> None:
    html, markdown = trained.get("report.html").text, trained.get("report.md").text
    values = html[html.index("<h2>Values") : html.index("<h2>Curves")]
    heads = re.findall(r'<th scope="colgroup" colspan="(\d)">([^<]+)', values)
    assert [name for _, name in heads] == ["what it paints", "what it knows"]
    num_columns = len(re.findall(r'<th scope="col">', values))
    assert sum(int(number) for number, _ in heads) == num_columns - 1
    assert "| paints: painted share |" in markdown
    assert "| knows: foreground AP |" in markdown
    for text in (html, markdown):
        assert re.search(r"Random scores have a foreground AP of 0\.\d+ and a colour AP of 0", text)


def test_papers_of_the_measures_are_named_only_where_these_are_shown(
    trained: Trained, queued: Json
) -> None:
    without = trained.client.get(f"/studies/{queued['id']}/report.md").raise_for_status().text
    shown = trained.get("report.md").text
    for name in ("Hoffman", "Burda", "Menon"):
        assert shown.count(name) == 2, name
        assert name not in without
    assert "By these criteria they decide nothing." in shown


def test_html_begins_with_the_decision_and_has_every_part(trained: Trained) -> None:
    html = trained.get("report.html").text
    parts = ["Undecided:", "<h2>Looks", "<h2>Arms", "<h2>Values", "<h2>Curves", "Reconstructions",
             "Settings that differ", "Paired differences", "<h2>Methods", "<h2>Seeds"]  # fmt: skip
    places = [html.index(part) for part in parts]
    assert places == sorted(places)
    assert trained.study["recommendation"]["reason"].split(":")[0] in html


def test_html_loads_and_runs_nothing(trained: Trained) -> None:
    answer = trained.get("report.html")
    assert answer.headers["content-security-policy"].endswith("sandbox")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "<script" not in answer.text
    assert not re.search(r"https?://", answer.text)
    assert set(re.findall(r'src="([^,"]+),', answer.text)) == {"data:image/png;base64"}


def test_html_shows_the_median_and_the_worst_run_of_each_arm(trained: Trained) -> None:
    html = trained.get("report.html").text
    assert len(re.findall(r"<figcaption>median run: seed \d", html)) == 2
    assert len(re.findall(r"<figcaption>worst run: seed \d", html)) == 2
    assert "There is no picture." not in html
    assert html.count("data:image/png") == 5


def test_html_and_markdown_have_one_row_per_seed(trained: Trained) -> None:
    jobs = [job for arm in trained.study["arms"] for job in arm["jobs"]]
    html, markdown = trained.get("report.html").text, trained.get("report.md").text
    assert len(jobs) == 10
    for job in jobs:
        assert html.count(f"<td>{job}</td>") == 1
        assert markdown.count(f"| {escape_markdown(job)} |") == 1


def test_markdown_has_no_picture_and_every_other_part(trained: Trained) -> None:
    markdown = trained.get("report.md").text
    headings = re.findall("^## (.+)$", markdown, flags=re.M)
    assert headings == ["Looks", "Arms", "Values", "Settings that differ", "Paired differences",
                        "Seeds", "Methods", "Sources"]  # fmt: skip
    assert "![" not in markdown


def test_markdown_keeps_its_tables_whatever_the_names(trained: Trained) -> None:
    for block in re.split(r"\n\n+", trained.get("report.md").text):
        if block.startswith("|"):
            rows = block.strip().splitlines()
            assert len({re.sub(r"\\.", "", row).count("|") for row in rows}) == 1


def test_names_stay_inert_and_whole_in_reports(trained: Trained) -> None:
    html, markdown = trained.get("report.html").text, trained.get("report.md").text
    assert "x" * 60 in html
    assert "x" * 60 in markdown
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<script" not in markdown
    assert "\\*\\*d\\*\\*" in markdown
    for text in (html, markdown):
        assert "\u202e" not in text
        assert "[U+202E" in text.replace("\\", "")


def test_thresholds_of_the_query_judge_the_report_anew(trained: Trained) -> None:
    strict = trained.get("report.md", min_accuracy=0.99, max_accuracy=1.0).text
    assert "**No recommendation:** no arm passed once" in strict
    assert "accuracy_in_range (0.99 to 1.00)" in strict
    assert "These thresholds are not those of the study itself." in strict
    assert "These thresholds are not" not in trained.get("report.md").text


def test_report_of_a_study_that_has_not_begun(trained: Trained, queued: Json) -> None:
    for name in ("report.html", "report.md"):
        text = trained.client.get(f"/studies/{queued['id']}/{name}").raise_for_status().text
        assert "No data:" in text
        assert "SHA-256 of the grids: not known yet." in text
    picture = trained.client.get(f"/studies/{queued['id']}/curves.png").raise_for_status()
    assert picture.content.startswith(b"\x89PNG")


# -- methods


def test_methods_say_what_was_done(trained: Trained) -> None:
    methods = trained.get("report.md").text.partition("## Methods")[2]
    for text in [
        "The data set is atomic, 80 grids for training, 10 for validation and 10 for testing",
        "generated with data seed 42, the same for all runs",
        "No validation or test grid occurs in training, not even turned or reflected.",
        "2 arms (one configuration each, all but the seed) with 5 seeds: 0 to 4.",
        "for 2 epochs (4 steps)",
        "10 or 3 latent dimensions",
        "all 2 planned epochs",
        "0.05 / (1 planned look x 1 other arm) = 0.05",
        "the chance that the best arm is ruled out is at most 5%",
        "1 of 1 took place",
        "No run is missing.",
        "Boschloo, 1970",
        "Wilson, 1927",
        "Efron, 1987",
    ]:
        assert text in methods
    for arm in trained.study["arms"]:
        assert arm["config_sha256"] in methods
    (sha256,) = {job["dataset_summary"]["sha256"] for job in read_jobs(trained)}
    assert sha256 in methods
    assert all(source.split(",")[0] in methods for source in SOURCES)


def read_jobs(trained: Trained) -> list[Json]:
    ids = [job for arm in trained.study["arms"] for job in arm["jobs"]]
    return [trained.client.get(f"/jobs/{job}").json() for job in ids]


# -- paired differences


def test_differences_are_between_the_kept_arms_for_each_metric(trained: Trained) -> None:
    differences = trained.study["differences"]
    metrics = [difference["metric"] for difference in differences]
    assert metrics == [metric for metric in GroupMetric if metric in metrics]
    assert "train_pixel_accuracy" in metrics
    arms = {arm["arm"]: arm for arm in trained.study["arms"]}
    for each in differences:
        assert {each["arm"], each["other"]} == set(arms)
        assert each["num_pairs"] == 5
        assert each["low"] <= each["median"] <= each["high"]
        first, second = (arms[each[key]]["metrics"][each["metric"]]["values"]
                         for key in ("arm", "other"))  # fmt: skip
        pairs = sorted(one - other for one, other in zip(first, second, strict=True))
        assert each["median"] == pytest.approx(pairs[2])


def test_a_study_without_pairs_has_no_differences(queued: Json) -> None:
    assert queued["differences"] == []


# -- curves


def test_curves_are_a_picture(trained: Trained) -> None:
    answer = trained.get("curves.png")
    assert answer.headers["content-type"] == "image/png"
    with Image.open(io.BytesIO(answer.content)) as image:
        assert (image.format, image.width) == ("PNG", 1800)


# -- tables


def test_jobs_table_has_one_row_per_arm_and_seed(trained: Trained) -> None:
    rows = trained.read_csv("jobs.csv")
    arms = trained.study["arms"]
    assert [row["job_id"] for row in rows] == [job for arm in arms for job in arm["jobs"]]
    assert [row["seed"] for row in rows] == [*map(str, SEEDS)] * 2
    for row, arm in zip(rows, [arm for arm in arms for _ in SEEDS], strict=True):
        seed = arm["seeds"][int(row["seed"])]
        assert row["config_sha256"] == arm["config_sha256"]
        assert (row["option"], row["status"]) == (arm["option"], "succeeded")
        assert row["has_passed"] == str(seed["has_passed"]).lower()
        assert row["diagnosis"] == seed["diagnosis"]
        assert (row["data_seed"], row["epochs"], row["is_reused"]) == ("42", "2", "false")
        assert float(row["seconds"]) > 0
        for metric in GroupMetric:
            value = arm["metrics"][metric]["values"][int(row["seed"])]
            assert row[metric] == ("" if value is None else repr(value))


def test_jobs_table_follows_the_thresholds_of_the_query(trained: Trained) -> None:
    rows = trained.read_csv("jobs.csv", min_accuracy=0.99, max_accuracy=1.0)
    assert {row[CriterionName.accuracy_in_range] for row in rows} == {"failed"}
    assert {row["has_passed"] for row in rows} == {"false"}


def test_metrics_table_has_one_row_per_job_and_epoch(trained: Trained) -> None:
    rows = trained.read_csv("metrics.csv")
    jobs = [job for arm in trained.study["arms"] for job in arm["jobs"]]
    assert [(row["job_id"], row["epoch"]) for row in rows] == [
        (job, epoch) for job in jobs for epoch in ("1", "2")
    ]
    columns = set(EpochMetrics.model_fields) - {"job_id"}
    lists = {name for name in columns if "_per_" in name and name != "grids_per_second"}
    assert columns - lists <= set(rows[0])


def test_metrics_table_repeats_every_number_exactly(trained: Trained) -> None:
    for row in trained.read_csv("metrics.csv"):
        metrics = trained.client.get(f"/jobs/{row['job_id']}/metrics").json()["data"]
        epoch = metrics[int(row["epoch"]) - 1]
        for name in ("train_loss", "val_recon_loss", "learning_rate", "seconds"):
            assert float(row[name]) == epoch[name]
        for name in ("val_foreground_ap", "val_matched_shift", "val_mutual_information"):
            assert float(row[name]) == epoch[name]
        for name in ("train_kl", "val_kl", "val_information"):
            values = epoch[f"{name}_per_dimension"]
            cells = [row[f"{name}_{number}"] for number in range(10)]
            assert [float(cell) for cell in cells if cell] == values
            assert cells[len(values) :] == [""] * (10 - len(values))
        recalls = [row[f"val_recall_{colour}"] for colour in range(10)]
        expected = epoch["val_recall_per_colour"]
        assert [float(cell) if cell else None for cell in recalls] == expected


@pytest.mark.parametrize("missing", [null(), JSON.NULL])
def test_metrics_table_leaves_out_what_epochs_of_older_versions_lack(
    trained: Trained, missing: Any
) -> None:
    """Their lists are NULL if the upgrade added the column, and null if it was stored so."""
    job_id = trained.study["arms"][0]["jobs"][0]
    is_older = (col(EpochMetrics.job_id) == job_id) & (col(EpochMetrics.epoch) == 1)
    lacking = {"val_information_per_dimension": missing, "val_foreground_ap": None}
    with trained.engine.begin() as connection:
        stored = connection.execute(select(EpochMetrics.__table__).where(is_older)).one()  # type: ignore[attr-defined]
        connection.execute(update(EpochMetrics).where(is_older).values(lacking))
    answer = trained.client.get(f"/studies/{trained.study['id']}/metrics.csv")
    with trained.engine.begin() as connection:
        whole = {name: stored._mapping[name] for name in lacking}
        connection.execute(update(EpochMetrics).where(is_older).values(whole))
    rows = list(csv.DictReader(io.StringIO(answer.text, newline=""), strict=True))
    older, newer = (row for row in rows if row["job_id"] == job_id)
    columns = [f"val_information_{number}" for number in range(10)]
    assert [older[column] for column in [*columns, "val_foreground_ap"]] == [""] * 11
    assert all(newer[column] for column in columns)


@pytest.mark.parametrize("name", ["jobs.csv", "metrics.csv"])
def test_tables_are_files_of_utf8_and_rfc_4180(trained: Trained, name: str) -> None:
    answer = trained.get(name)
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert answer.headers["x-content-type-options"] == "nosniff"
    safe = rf'attachment; filename="losslab_study_[0-9a-f]{{12}}_{name}"'
    assert re.fullmatch(safe, answer.headers["content-disposition"])
    text = answer.content.decode("utf-8")
    assert text.endswith("\r\n")
    assert "\n" not in text.replace("\r\n", "")
    assert len({len(row) for row in csv.reader(io.StringIO(text, newline=""), strict=True)}) == 1


def test_table_and_report_say_what_trained_the_jobs(trained: Trained) -> None:
    rows = [row for row in trained.read_csv("jobs.csv") if row["device"]]
    assert rows
    for row in rows:
        assert row["losslab_version"] == version("losslab")
        assert row["torch_version"] == torch.__version__
        assert len(row["source_sha256"]) == 64
    text = trained.get("report.html").text
    assert "Trained with Losslab" in text
    assert f"PyTorch {torch.__version__}" in text


def test_names_in_tables_are_whole_and_no_formulas(trained: Trained) -> None:
    rows = trained.read_csv("jobs.csv")
    assert {row["study_name"] for row in rows} == {f"'{NAME}"}
    assert {row["arm"] for row in rows} == {"a", f"'{ARM}"}
    assert {row["arm"] for row in trained.read_csv("metrics.csv")} == {"a", f"'{ARM}"}


@pytest.mark.parametrize("name", ["jobs.csv", "metrics.csv"])
def test_pandas_reads_the_tables_without_options(trained: Trained, name: str) -> None:
    pandas = pytest.importorskip("pandas")
    table = pandas.read_csv(io.BytesIO(trained.get(name).content))
    texts = {"study", "study_name", "arm", "option", "job_id", "status", "diagnosis",
             "config_sha256", "started_at", "ended_at", "recorded_at", "device", "losslab_version",
             "revision", "is_changed", "source_sha256", "torch_version", "number_format",
             "host", *CriterionName}  # fmt: skip
    for column in table.columns:
        is_number = pandas.api.types.is_numeric_dtype(table[column])
        assert is_number or column in texts, column
    assert (
        pandas.to_datetime(table["started_at" if name == "jobs.csv" else "recorded_at"])
        .notna()
        .all()
    )


def test_tables_of_a_study_that_has_not_begun(trained: Trained, queued: Json) -> None:
    client, path = trained.client, f"/studies/{queued['id']}"
    jobs = list(csv.DictReader(io.StringIO(client.get(f"{path}/jobs.csv").text, newline="")))
    assert [(row["status"], row["has_passed"], row["seconds"]) for row in jobs] == [
        ("queued", "", "")
    ] * 2
    assert len(client.get(f"{path}/metrics.csv").text.splitlines()) == 1


def test_a_deleted_job_keeps_its_row_and_is_reported_as_missing(trained: Trained) -> None:
    request = {"options": ["a"], "num_seeds": 2, "config": TINY}
    study = trained.client.post("/studies", json=request).raise_for_status().json()
    path, job = f"/studies/{study['id']}", study["arms"][0]["jobs"][0]
    trained.client.post(f"{path}/cancel").raise_for_status()
    trained.client.delete(f"/jobs/{job}").raise_for_status()
    rows = list(csv.DictReader(io.StringIO(trained.client.get(f"{path}/jobs.csv").text)))
    assert [(row["seed"], row["status"], row["epochs"]) for row in rows] == [
        ("0", "", ""),
        ("1", "cancelled", "0"),
    ]
    markdown = trained.client.get(f"{path}/report.md").text
    assert "Missing, because the run was lost, cancelled or deleted: 2 of a." in markdown
    assert "| deleted |" in markdown


# -- requests


NAMES = ["report.html", "report.md", "curves.png", "jobs.csv", "metrics.csv"]


@pytest.mark.parametrize("name", NAMES)
def test_unknown_study_is_not_found(trained: Trained, name: str) -> None:
    problem(trained.client.get(f"/studies/{'0' * 12}/{name}"), 404)


@pytest.mark.parametrize("name", NAMES[:-1])
def test_impossible_thresholds_are_refused(trained: Trained, name: str) -> None:
    path = f"/studies/{trained.study['id']}/{name}"
    problem(trained.client.get(path, params={"min_accuracy": 2}), 422)
    problem(trained.client.get(path, params={"min_accuracy": 0.9, "max_accuracy": 0.1}), 422)


@pytest.mark.parametrize(
    ("name", "media_type"),
    [
        ("report.html", "text/html"),
        ("report.md", "text/plain"),
        ("curves.png", "image/png"),
        ("jobs.csv", "text/csv"),
        ("metrics.csv", "text/csv"),
    ],
)
def test_description_has_the_type_of_each_answer(
    trained: Trained, name: str, media_type: str
) -> None:
    paths = trained.client.get("/openapi.json").json()["paths"]
    responses = paths[f"/studies/{{study_id}}/{name}"]["get"]["responses"]
    assert list(responses["200"]["content"]) == [media_type]
    assert {"404", "422"} <= responses.keys()
