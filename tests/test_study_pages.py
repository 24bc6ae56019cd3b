"""The pages of studies as the server sends them: complete without a script, and safe."""

import html
import re
from typing import Any

import pytest
from conftest import BOTH_DATABASES, TINY, drain
from fastapi.testclient import TestClient
from markupsafe import escape
from sqlalchemy import Engine, update
from sqlmodel import Session, col
from statements import Statement, recording
from stored_studies import REACHED, store_study
from test_pages import HOSTILE, OWN, text_of

from server.jobs.studies import find_study
from server.models.epochs import EpochMetrics
from server.models.tables import Job, JobStatus
from server.settings import Settings
from server.texts import show_controls

pytestmark = BOTH_DATABASES

HEALTHY, COLLAPSED, PAINTED = "healthy", "mode_collapse", "over_painted"
DECIDED = {"a": [COLLAPSED] * 10, "b": [HEALTHY] * 9 + ["under_informed"]}
#: Overrides the direction of the text after it, in Hebrew, and as long as a name may be.
BACKWARDS = "\u202egnirts \u05e9\u05dc\u05d5\u05dd <b>" + "x" * 180


def engine_of(client: TestClient) -> Engine:
    """The engine of the server that answers the client."""
    engine: Engine = client.app.state.engine  # type: ignore[attr-defined]
    return engine


def pick_of_jobs(statements: list[Statement]) -> list[str]:
    """Those about jobs of studies."""
    names = ("study_job", "epoch_metrics", "artifact")
    return [each.text for each in statements if any(name in each.text for name in names)]


def read_page(client: TestClient, study_id: str, query: str = "") -> str:
    return client.get(f"/ui/studies/{study_id}{query}").raise_for_status().text


def list_buttons(page: str) -> set[str]:
    return set(re.findall(r'action="/ui/studies/[0-9a-f]{12}/([a-z]+)"', page))


def list_labels(page: str) -> list[str]:
    """What a reader who does not see the marks is told about the seeds."""
    return re.findall(r'aria-label="(seed \d+: [^"]+)"', page)


# -- the list


def test_list_without_studies_tells_how_to_post_one(client: TestClient) -> None:
    page = client.get("/ui/studies")
    assert "No study yet" in text_of(page.text)
    assert 'href="/ui/studies/new"' in page.text
    assert 'aria-current="page">Studies' in page.text


def test_list_has_the_decision_of_a_study_that_ended(client: TestClient, engine: Engine) -> None:
    ended = store_study(engine, DECIDED, name="which loss")
    live = store_study(engine, {"a": [COLLAPSED, "queued"], "b": ["running", "queued"]})
    page = client.get("/ui/studies").text
    assert page.index(f'id="study-{live}"') < page.index(f'id="study-{ended}"')
    shown = text_of(page)
    reason = client.get(f"/studies/{ended}").json()["recommendation"]["reason"]
    assert f"✓ decided {reason}." in shown
    assert "2 arms: a , b" in shown
    assert "2 queued, 1 running, 1 succeeded" in shown
    assert shown.count("not ended yet") == 1


def test_list_decides_again_after_a_job_changed(client: TestClient, engine: Engine) -> None:
    study_id = store_study(engine, DECIDED)
    assert "9 of 10" in text_of(client.get("/ui/studies").text)
    lost = client.get(f"/studies/{study_id}").json()["arms"][1]["jobs"][0]
    client.delete(f"/jobs/{lost}").raise_for_status()
    assert "8 of 9" in text_of(client.get("/ui/studies").text)


def test_list_does_not_judge_ended_studies_again(client: TestClient, engine: Engine) -> None:
    for _ in range(3):
        store_study(engine, DECIDED)
    client.get("/ui/studies").raise_for_status()
    with recording(engine_of(client)) as statements:
        client.get("/ui/studies").raise_for_status()
    of_jobs = pick_of_jobs(statements)
    assert 0 < len(of_jobs) <= 2
    assert not [each for each in of_jobs if "epoch_metrics" in each]


def test_older_studies_are_on_further_pages(client: TestClient, engine: Engine) -> None:
    ids = {store_study(engine, {"a": ["queued"]}) for _ in range(27)}
    page = client.get("/ui/studies").text
    first = re.findall(r'id="study-([0-9a-f]{12})"', page)
    assert len(first) == 25
    (older,) = re.findall(r'href="([^"]+)">Older studies', page)
    second = re.findall(r'id="study-([0-9a-f]{12})"', client.get(html.unescape(older)).text)
    assert {*first, *second} == ids


# -- one study


def test_page_says_the_decision_first_and_each_arm_seed_by_seed(
    client: TestClient, engine: Engine
) -> None:
    study_id = store_study(engine, DECIDED, name="which loss")
    answer = client.get(f"/studies/{study_id}").json()
    page = read_page(client, study_id)
    shown = text_of(page)
    assert shown.index(answer["recommendation"]["reason"]) < shown.index("succeeded")
    assert "ruled out by b , p < 0.001, at 5 seeds" in shown
    assert "5 seeds ruled out: a" in shown
    assert "0 of 10" in shown
    assert "9 of 10" in shown
    assert "90.0%, 59.6% to 98.2%" in shown
    assert "kl per dimension 1 of 10" in shown
    labels = list_labels(page)
    assert len(labels) == 20
    assert labels[0] == "seed 0: mode collapse, failed"
    assert labels[10] == "seed 0: healthy, passed"
    assert labels[19] == "seed 9: under informed, failed"
    for arm in answer["arms"]:
        for job_id in arm["jobs"]:
            assert f'href="/ui/jobs/{job_id}" aria-label="seed' in page
    assert "class weighting" in shown
    assert "sqrt_inverse" in shown


def test_page_sets_what_arms_know_beside_what_they_paint(
    client: TestClient, engine: Engine
) -> None:
    study_id = store_study(engine, {"a": ["decision_collapse"] * 2, "b": [HEALTHY, COLLAPSED]})
    page = read_page(client, study_id)
    places = [page.index(f">{name}<") for name in ("Training", "What it paints", "What it knows")]
    assert places == sorted(places)
    levels = {"painted_share": 1, "val_foreground_ap": 1, "val_colour_ap": 1}
    for name, num_levels in (levels | {"val_mutual_information": 0}).items():
        drawing = page[page.index(f'id="curve-{name}"') :].split("</figure>")[0]
        assert drawing.count('class="limit"') == num_levels
        assert "last medians: a " in drawing
    for name in ("val_foreground_ap", "val_colour_ap", "val_mutual_information"):
        strips = page[page.index(f'id="strips-{name}"') :].split("</tbody>")[0]
        # The second seed of b is older than the measures.
        assert strips.count("<circle") == 3
    assert "was not measured" not in page


def test_thresholds_are_drawn_only_where_their_criteria_judge(
    client: TestClient, engine: Engine
) -> None:
    study_id = store_study(engine, {"b": [HEALTHY] * 2})
    page = read_page(client, study_id)
    assert page.count('class="band"') == 1 + 1  # the curves, and the strip of the arm
    assert "dashed: collapse threshold" in page
    assert "worst run by foreground IoU" in page
    page = read_page(client, study_id, "?criteria=evidence")
    assert 'class="band"' not in page
    assert "band: target" not in page
    assert "dashed: collapse threshold" not in page
    assert "worst run by colour AP" in page


def test_study_older_than_the_measures_says_so_in_one_line(
    client: TestClient, engine: Engine
) -> None:
    page = read_page(client, store_study(engine, {"a": [COLLAPSED] * 2}))
    assert text_of(page).count("What its jobs know was not measured") == 1
    assert 'id="curve-painted_share"' in page
    for name in ("val_foreground_ap", "val_colour_ap", "val_mutual_information"):
        assert f"-{name}" not in page


def test_page_leads_to_reports_and_tables(client: TestClient, engine: Engine) -> None:
    study_id = store_study(engine, DECIDED)
    page = read_page(client, study_id, "?min_accuracy=0.6")
    for name in ("report.html", "report.md", "curves.png", "jobs.csv"):
        assert f'href="/studies/{study_id}/{name}?min_accuracy=0.6"' in page
    assert f'href="/studies/{study_id}/metrics.csv"' in page


def test_thresholds_of_the_query_judge_the_page_anew(client: TestClient, engine: Engine) -> None:
    study_id = store_study(engine, DECIDED, thresholds={"min_kl_per_dimension": 0.01})
    assert "9 of 10" in text_of(read_page(client, study_id))
    page = text_of(read_page(client, study_id, "?min_kl_per_dimension=0.001"))
    assert "10 of 10" in page
    assert "Judged otherwise: min kl per dimension 0.001" in page
    assert client.get(f"/ui/studies/{study_id}?min_accuracy=2").status_code == 422
    assert client.get(f"/ui/studies/{study_id}?max_accuracy=0.1").status_code == 422


def test_seeds_without_a_verdict_have_marks_of_their_own(
    client: TestClient, engine: Engine
) -> None:
    outcomes = ["queued", "running", "paused", "cancelled", "failed", HEALTHY]
    study_id = store_study(engine, {"b": outcomes})
    deleted = client.get(f"/studies/{study_id}").json()["arms"][0]["jobs"][3]
    page = read_page(client, study_id)
    told = ["waiting", "running", "paused", "missing, its job was cancelled",
            "missing, its job failed", "healthy, passed"]  # fmt: skip
    assert list_labels(page) == [f"seed {n}: {each}" for n, each in enumerate(told)]
    assert "2 missing" in text_of(page)
    client.delete(f"/jobs/{deleted}").raise_for_status()
    page = read_page(client, study_id)
    assert "seed 3: missing, its job was deleted" in list_labels(page)
    assert deleted not in page
    for kind in ("waiting", "running", "paused", "missing", "healthy"):
        assert f'id="seed-{kind}"' in page
        assert f'href="#seed-{kind}"' in page


def test_each_diagnosis_of_a_seed_has_a_mark_and_a_name(client: TestClient, engine: Engine) -> None:
    study_id = store_study(engine, {"b": list(REACHED)})
    (arm,) = client.get(f"/studies/{study_id}").json()["arms"]
    assert arm["diagnoses"] == dict.fromkeys(REACHED, 1), "each is what it should be"
    page = read_page(client, study_id)
    for number, kind in enumerate(REACHED):
        outcome = "passed" if kind == HEALTHY else "failed"
        assert f"seed {number}: {kind.replace('_', ' ')}, {outcome}" in list_labels(page)
        assert f'id="seed-{kind}"' in page
        assert f'href="#seed-{kind}"' in page


def test_study_without_an_epoch_is_a_complete_page(client: TestClient, engine: Engine) -> None:
    study_id = store_study(engine, {"a": ["queued"] * 5, "b": ["queued"] * 5})
    answer = client.get(f"/ui/studies/{study_id}")
    page = text_of(answer.text)
    assert "no look yet Nothing is decided yet: the first look is at 5 seeds of each arm." in page
    assert "5 seeds next look" in page
    assert "no epoch has ended yet" in answer.text
    assert 'data-refresh-seconds="4"' in answer.text


def test_study_that_ended_is_not_loaded_again(client: TestClient, engine: Engine) -> None:
    assert "data-refresh-seconds" not in read_page(client, store_study(engine, DECIDED))


def test_queries_of_a_page_do_not_grow_with_arms_and_seeds(
    client: TestClient, engine: Engine
) -> None:
    small = store_study(engine, {"a": [COLLAPSED], "b": [HEALTHY]})
    grid = {"beta": [0.25, 0.5, 1, 2, 4], "free_bits": [0, 0.1]}
    large = store_study(engine, {"a": [COLLAPSED] * 6, "b": [HEALTHY] * 6}, grid=grid)
    numbers = []
    for study_id in (small, large):
        with recording(engine_of(client)) as statements:
            page = read_page(client, study_id)
        numbers.append(len(pick_of_jobs(statements)))
    assert len(list_labels(page)) == 120
    assert 0 < numbers[0] == numbers[1] <= 6


def test_seed_that_diverged_does_not_flatten_the_others(client: TestClient, engine: Engine) -> None:
    study_id = store_study(engine, {"b": [HEALTHY] * 60})
    job_id = client.get(f"/studies/{study_id}").json()["arms"][0]["jobs"][0]
    with engine.begin() as connection:
        huge = update(EpochMetrics).where(col(EpochMetrics.job_id) == job_id)
        connection.execute(huge.values(train_loss=1e12))
    page = read_page(client, study_id)
    loss = page[page.index('id="curve-train_loss"') : page.index('id="curve-train_pixel')]
    assert ">0.2</text>" in loss
    assert "e+" not in loss


def test_of_long_trainings_not_every_epoch_is_drawn(client: TestClient, engine: Engine) -> None:
    outcomes = {"b": [HEALTHY] + ["queued"] * 99}
    study_id = store_study(engine, outcomes, config={"epochs": 1000})
    page = read_page(client, study_id)
    (runs,) = re.findall(r'class="runs" d="([^"]+)"', page)[:1]
    points = runs.removeprefix("M").split()[::2]
    assert (points[0], points[-1]) == ("0", "1000")
    assert 95 <= len(points) <= 102


def test_page_shows_pictures_of_the_median_and_the_worst_run(
    client: TestClient, engine: Engine, settings: Settings
) -> None:
    body = {"options": ["a"], "num_seeds": 2, "config": TINY}
    study = client.post("/studies", json=body).raise_for_status().json()
    drain(settings, engine)
    page = read_page(client, study["id"])
    arm = client.get(f"/studies/{study['id']}").json()["arms"][0]
    pictures = re.findall(r'<img [^>]*src="([^"]+)"', page)
    wanted = [arm["median_job_id"], arm["worst_job_id"]]
    assert arm["median_job_id"] in arm["jobs"]
    urls = [f"/jobs/{job_id}/reconstructions/2.png" for job_id in dict.fromkeys(wanted)]
    assert pictures == urls
    for url in urls:
        assert client.get(url).headers["content-type"] == "image/png"


def test_job_leads_to_its_study_and_its_place_there(client: TestClient, engine: Engine) -> None:
    study_id = store_study(engine, DECIDED, name="which loss")
    job_id = client.get(f"/studies/{study_id}").json()["arms"][1]["jobs"][3]
    page = client.get(f"/ui/jobs/{job_id}").text
    assert "Seed 3 of arm b , 4 of 10, in the study which loss" in text_of(page)
    assert f'href="/ui/studies/{study_id}"' in page
    assert 'href="/ui/studies/new"' in client.get("/ui/jobs/new").text


# -- actions


def test_buttons_are_those_that_the_state_allows(client: TestClient, engine: Engine) -> None:
    live = store_study(engine, {"a": [COLLAPSED, "queued"]})
    assert list_buttons(read_page(client, live)) == {"pause", "cancel", "seeds"}
    ended = store_study(engine, {"a": [COLLAPSED] * 2})
    assert list_buttons(read_page(client, ended)) == {"seeds", "delete"}
    lost = store_study(engine, {"a": [COLLAPSED, "failed"]})
    assert list_buttons(read_page(client, lost)) == {"resume", "seeds", "delete"}


def test_study_is_paused_resumed_extended_and_cancelled_from_its_page(
    client: TestClient, engine: Engine
) -> None:
    study_id = store_study(engine, {"a": ["queued"] * 2, "b": ["queued"] * 2})

    def do(action: str, **fields: str) -> dict[str, Any]:
        answer = client.post(
            f"/ui/studies/{study_id}/{action}", data=fields, headers=OWN, follow_redirects=False
        )
        assert (answer.status_code, answer.headers["location"]) == (303, f"/ui/studies/{study_id}")
        study: dict[str, Any] = client.get(f"/studies/{study_id}").json()
        return study

    assert do("pause")["num_by_status"] == {"paused": 4}
    assert list_buttons(read_page(client, study_id)) == {"resume", "cancel", "seeds"}
    assert do("resume")["num_by_status"] == {"queued": 4}
    assert do("seeds", num="3")["num_by_status"] == {"queued": 10}
    assert do("cancel")["status"] == "cancelled"
    assert "delete" in list_buttons(read_page(client, study_id))


@pytest.mark.parametrize(("jobs", "num_left"), [("keep", 2), ("delete", 0)])
def test_study_is_deleted_with_or_without_its_jobs(
    client: TestClient, engine: Engine, jobs: str, num_left: int
) -> None:
    study_id = store_study(engine, {"a": [COLLAPSED] * 2})
    url = f"/ui/studies/{study_id}/delete"
    answer = client.post(url, data={"jobs": jobs}, headers=OWN, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/ui/studies")
    assert client.get(f"/ui/studies/{study_id}").status_code == 404
    assert len(client.get("/jobs").json()["data"]) == num_left


def test_what_a_study_cannot_do_is_told_on_a_page(client: TestClient, engine: Engine) -> None:
    study_id = store_study(engine, {"a": [COLLAPSED]})
    for action, fields, status in (
        ("cancel", {}, 409),
        ("explode", {}, 404),
        ("seeds", {"num": "x"}, 422),
        ("seeds", {"num": "100"}, 409),
    ):
        answer = client.post(f"/ui/studies/{study_id}/{action}", data=fields, headers=OWN)
        assert answer.status_code == status
        assert answer.headers["content-type"].startswith("text/html")
    other = {"Sec-Fetch-Site": "cross-site"}
    url = f"/ui/studies/{study_id}/delete"
    assert client.post(url, data={"jobs": "delete"}, headers=other).status_code == 403
    assert client.get("/ui/studies/000000000000").status_code == 404
    assert client.get("/ui/studies?after=000000000000").status_code == 404


# -- names


@pytest.mark.parametrize("name", [HOSTILE, BACKWARDS])
def test_names_are_whole_and_only_text(client: TestClient, engine: Engine, name: str) -> None:
    arm = name[:40]
    body = {"options": [{"name": arm, "base": "b"}, "a"], "name": name, "num_seeds": 1}
    study = client.post("/studies", json=body).raise_for_status().json()
    job_id = study["arms"][0]["jobs"][0]
    for path in ("/ui/studies", f"/ui/studies/{study['id']}", f"/ui/jobs/{job_id}"):
        page = client.get(path).text
        assert "<script>alert" not in page
        assert "<img src=x" not in page
        assert f"<bdi>{escape(show_controls(name))}</bdi>" in page
        for shown in (name, arm):
            assert " ".join(show_controls(shown).split()) in text_of(page)


def test_sentence_keeps_names_that_run_from_right_to_left_apart(
    client: TestClient, engine: Engine
) -> None:
    study_id = store_study(engine, DECIDED)
    with Session(engine) as session:
        study = find_study(session, study_id)
        study.arms = [study.arms[0], {**study.arms[1], "name": "\u202eb"}]
        session.add(study)
        session.commit()
    page = read_page(client, study_id)
    sentence = page[page.index('<p class="sentence">') :]
    assert "<bdi>[U+202E]b</bdi> escapes collapse" in sentence


def test_pages_of_studies_allow_nothing_but_their_own_files(
    client: TestClient, engine: Engine
) -> None:
    study_id = store_study(engine, DECIDED)
    for path in ("/ui/studies", f"/ui/studies/{study_id}", "/ui/studies/new"):
        answer = client.get(path)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script>", answer.text)
        for address in re.findall(r'(?:src|href)="([^"]+)"', answer.text):
            assert address.startswith(("/", "#")), address


def test_job_that_runs_has_curves_already(client: TestClient, engine: Engine) -> None:
    study_id = store_study(engine, {"b": [HEALTHY, HEALTHY]})
    job_id = client.get(f"/studies/{study_id}").json()["arms"][0]["jobs"][1]
    with engine.begin() as connection:
        running = {"status": JobStatus.running, "epochs_completed": 5, "ended_at": None}
        connection.execute(update(Job).where(col(Job.id) == job_id).values(running))
    page = read_page(client, study_id)
    (runs,) = re.findall(r'class="runs" d="([^"]+)"', page)[:1]
    assert runs.count("M") == 2
