"""The dashboard as the server sends it: complete without a script, and safe."""

import gzip
import html
import re
from pathlib import Path

import pytest
from conftest import BOTH_DATABASES, TINY, SubmitJob, drain, queue_job, read
from fastapi.testclient import TestClient
from sqlalchemy import Engine
from statements import recording

from server.dashboard.rendering import StaticFiles
from server.models.configuration import resolve_config
from server.models.options import OPTIONS, BuiltInOption
from server.models.tables import JobStatus
from server.settings import Settings

OWN = {"Sec-Fetch-Site": "same-origin"}
HOSTILE = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7 * 7 }}"

Finished = tuple[TestClient, dict[str, str]]


def text_of(page: str) -> str:
    """What a reader sees, on one line."""
    body = re.sub(r"<script.*?</script>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def test_first_page_without_jobs_tells_how_to_post_one(client: TestClient) -> None:
    page = text_of(client.get("/").text)
    assert "No job yet" in page
    assert "losslab submit --option b --quick-test" in page
    assert "curl -s http://localhost/jobs" in page
    assert "no worker" in page


@BOTH_DATABASES
def test_first_page_lists_jobs_with_what_they_reached(finished: Finished) -> None:
    client, ids = finished
    answer = client.get("/")
    page = text_of(answer.text)
    for option, job_id in ids.items():
        assert f"run {option}" in page
        assert f'href="/ui/jobs/{job_id}"' in answer.text
        accuracy = client.get(f"/jobs/{job_id}").json()["train_pixel_accuracy"]
        assert f"{accuracy:.1%}" in page
    assert page.count("✗ failure") == 3
    assert "epoch 2 of 2" in page


@BOTH_DATABASES
@pytest.mark.parametrize(
    ("query", "shown"),
    [
        ("", "abc"),
        ("?option=b", "b"),
        ("?option=&status=succeeded", "abc"),
        ("?status=failed", ""),
        ("?status=nonsense&option=z", "abc"),
    ],
)
def test_jobs_are_filtered(finished: Finished, query: str, shown: str) -> None:
    client, ids = finished
    page = client.get(f"/{query}").text
    assert [option for option in "abc" if f'id="job-{ids[option]}"' in page] == list(shown)


@BOTH_DATABASES
def test_older_jobs_are_on_further_pages(client: TestClient, submit_job: SubmitJob) -> None:
    ids = {submit_job().id for _ in range(30)}
    page = client.get("/").text
    first = set(re.findall(r'id="job-([0-9a-f]{12})"', page))
    assert len(first) == 25
    (older,) = re.findall(r'href="([^"]+)">Older jobs', page)
    second = set(re.findall(r'id="job-([0-9a-f]{12})"', client.get(html.unescape(older)).text))
    assert first | second == ids


def test_page_of_a_job_has_verdict_pictures_events_and_files(finished: Finished) -> None:
    client, ids = finished
    job_id = ids["b"]
    answer = client.get(f"/ui/jobs/{job_id}")
    page = text_of(answer.text)
    verdict = client.get(f"/jobs/{job_id}/verdict").json()
    assert verdict["summary"] in page
    for criterion in verdict["criteria"]:
        assert criterion["name"].replace("_", " ") in page
        assert criterion["target"] in page
        assert criterion["explanation"] in page
    for picture in client.get(f"/jobs/{job_id}/reconstructions").json()["data"]:
        assert picture["url"] in answer.text
    for checkpoint in client.get(f"/jobs/{job_id}/checkpoints").json()["data"]:
        assert f'href="{checkpoint["url"]}"' in answer.text
    for told in client.get(f"/jobs/{job_id}/events").json()["data"]:
        assert told["message"] in page
    assert "sqrt_inverse" in page
    assert "[EPOCH 2/2]" in page


def test_refresh_of_a_live_page_has_no_curves(finished: Finished) -> None:
    client, ids = finished
    url = f"/ui/jobs/{ids['b']}"
    assert 'id="drawing"' in client.get(url).text
    again = client.get(url, headers={"Losslab-Refresh": "1"}).text
    assert 'id="drawing"' not in again
    assert 'id="pictures"' in again


@BOTH_DATABASES
def test_live_page_reads_its_epochs_once(finished: Finished) -> None:
    client, ids = finished
    engine: Engine = client.app.state.engine  # type: ignore[attr-defined]
    with recording(engine) as statements:
        client.get(f"/ui/jobs/{ids['b']}", headers={"Losslab-Refresh": "1"}).raise_for_status()
    of_epochs = [each.text for each in statements if "FROM epoch_metrics" in each.text]
    rows, lists = of_epochs  # the lists of those epochs alone whose lists are shown
    assert "epoch_metrics.val_kl_per_dimension" not in rows
    assert "epoch_metrics.val_kl_per_dimension" in lists


def test_pages_show_moments_in_utc_for_the_script_to_translate(finished: Finished) -> None:
    client, ids = finished
    page = client.get(f"/ui/jobs/{ids['a']}").text
    moments = re.findall(r'<time datetime="([^"]+)">([^<]+)</time>', page)
    assert moments
    for machine, human in moments:
        assert machine.endswith("+00:00")
        assert human == machine.replace("T", " ").replace("+00:00", " UTC")


def test_comparison_shows_criteria_differences_and_a_recommendation(finished: Finished) -> None:
    client, ids = finished
    query = "&".join(f"job_id={job_id}" for job_id in ids.values())
    answer = client.get(f"/ui/compare?{query}")
    page = text_of(answer.text)
    comparison = client.get(f"/comparisons?{query}").json()
    assert comparison["reason"] in page
    assert set(comparison["differences"]) == {"option", "focal_gamma", "class_weighting"}
    assert "class weighting" in page
    assert page.count("✓ pass") + page.count("✗ fail ") + page.count("– no data") == 18
    assert f"/comparisons/report.html?{html.escape(query)}" in answer.text
    for job_id in ids.values():
        assert f"/jobs/{job_id}/reconstructions/2.png" in answer.text


def test_comparison_exports_with_the_thresholds_it_was_asked_for(finished: Finished) -> None:
    client, ids = finished
    answer = client.get(f"/ui/compare?job_id={ids['a']}&max_accuracy=0.99&min_accuracy=0.01")
    page = html.unescape(answer.text)
    (report,) = re.findall(r'href="(/comparisons/report.html[^"]+)"', page)
    assert "max_accuracy=0.99" in report
    assert "0.01 to 0.99" in client.get(report).text


def test_comparison_of_nothing_lets_one_choose(finished: Finished) -> None:
    client, ids = finished
    page = client.get("/ui/compare").text
    assert all(f'name="job_id" value="{job_id}"' in page for job_id in ids.values())


@BOTH_DATABASES
def test_jobs_to_compare_are_chosen_from_several_pages(
    client: TestClient, submit_job: SubmitJob
) -> None:
    ids = {submit_job().id for _ in range(60)}
    page = client.get("/ui/compare").text
    first = set(re.findall(r'name="job_id" value="([0-9a-f]{12})"', page))
    (older,) = re.findall(r'href="([^"]+)">Older jobs', page)
    page = client.get(html.unescape(older)).text
    second = set(re.findall(r'name="job_id" value="([0-9a-f]{12})"', page))
    assert len(first) == 50
    assert first | second == ids
    assert "Older jobs" not in page
    assert client.get("/ui/compare?after=000000000000").status_code == 404


@BOTH_DATABASES
def test_comparison_of_the_newest_of_each_option(finished: Finished) -> None:
    client, _ = finished
    assert "3 jobs compared" in client.get("/ui/compare?options=a,b,c").text


def test_form_shows_the_configuration_before_it_is_sent(client: TestClient) -> None:
    page = text_of(client.get("/ui/jobs/new?option=c&quick_test=true&epochs=7").text)
    assert "class weighting inverse" in page
    assert "epochs 7" in page
    assert "checkpoint every 1" in page


def test_form_posts_a_job(client: TestClient) -> None:
    form = {"option": "a", "name": "from the form", "quick_test": "true", "beta": "", "seed": "7"}
    form["priority"] = "3"
    answer = client.post("/ui/jobs", data=form, headers=OWN, follow_redirects=False)
    assert answer.status_code == 303
    job = client.get(answer.headers["location"].removeprefix("/ui")).json()
    assert (job["name"], job["option"], job["config"]["seed"]) == ("from the form", "a", 7)
    assert job["config"]["epochs"] == 5
    assert job["config"]["beta"] == 1.0
    assert job["priority"] == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("epochs", "many"), ("latent_dim", "0"), ("dataset", "missing"), ("option", "z")),
        ("priority", "101"),
    ],
)
def test_form_keeps_what_was_typed_and_names_the_wrong_field(
    client: TestClient, field: str, value: str
) -> None:
    form = {"option": "b", "name": "mine", field: value}
    answer = client.post("/ui/jobs", data=form, headers=OWN)
    assert answer.status_code == 422
    assert f"<strong>{field}</strong>" in answer.text
    assert 'value="mine"' in answer.text
    assert client.get("/jobs").json()["data"] == []


def test_job_shows_by_what_scripts_find_it(client: TestClient) -> None:
    sent = {"option": "b", "name": "mine", "priority": 7, "metadata": {"study": HOSTILE}}
    job_id = client.post("/jobs", json=sent).json()["id"]
    page = client.get(f"/ui/jobs/{job_id}").text
    assert HOSTILE not in page
    shown = text_of(page)
    for words in (f"Id {job_id}", "Priority 7", "study"):
        assert words in shown


def test_buttons_pause_resume_and_cancel(
    client: TestClient, engine: Engine, submit_job: SubmitJob
) -> None:
    job = submit_job()
    for action, status in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")):
        page = client.get(f"/ui/jobs/{job.id}").text
        assert f'action="/ui/jobs/{job.id}/{action}"' in page
        answer = client.post(
            f"/ui/jobs/{job.id}/{action}",
            data={"next": "/?status="},
            headers=OWN,
            follow_redirects=False,
        )
        assert (answer.status_code, answer.headers["location"]) == (303, "/?status=")
        assert read(engine, job).status == status


def test_succeeded_job_is_given_more_epochs(
    client: TestClient, settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    job = submit_job(epochs=1)
    drain(settings, engine)
    url = f"/ui/jobs/{job.id}/resume"
    assert client.post(url, data={"epochs": "x"}, headers=OWN).status_code == 422
    assert client.post(url, data={"epochs": "1"}, headers=OWN).status_code == 409
    client.post(url, data={"epochs": "2"}, headers=OWN)
    assert read(engine, job).status == JobStatus.queued
    assert read(engine, job).training_config.epochs == 2


def test_form_that_is_too_large_is_refused(client: TestClient) -> None:
    answer = client.post("/ui/jobs", data={"name": "x" * 70_000}, headers=OWN)
    assert answer.status_code == 413


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/ui/jobs/000000000000", 404),
        ("/ui/jobs/%3Cscript%3E", 404),
        ("/ui/compare?job_id=000000000000", 404),
        ("/ui/compare?job_id=x&options=a", 422),
        ("/ui/compare?min_accuracy=2&job_id=x", 422),
        ("/?after=000000000000", 404),
        ("/ui/nowhere", 404),
    ],
)
def test_errors_are_pages_too(client: TestClient, path: str, status: int) -> None:
    answer = client.get(path)
    assert answer.status_code == status
    assert answer.headers["content-type"].startswith("text/html")
    assert "All jobs" in answer.text
    assert "<script>" not in answer.text


def test_what_a_job_cannot_do_is_told_on_a_page(client: TestClient, submit_job: SubmitJob) -> None:
    job = submit_job()
    answer = client.post(f"/ui/jobs/{job.id}/explode", headers=OWN)
    assert answer.status_code == 404
    client.post(f"/ui/jobs/{job.id}/cancel", headers=OWN)
    answer = client.post(f"/ui/jobs/{job.id}/pause", headers=OWN)
    assert answer.status_code == 409
    assert "is cancelled" in text_of(answer.text)


def test_hostile_names_are_text(client: TestClient, engine: Engine) -> None:
    config = resolve_config(OPTIONS[BuiltInOption.a].config, overrides=TINY)
    job = queue_job(engine, option=BuiltInOption.a, config=config, name=HOSTILE)
    paths = ("/", f"/ui/jobs/{job.id}", "/ui/compare", f"/ui/compare?job_id={job.id}")
    for path in paths:
        page = client.get(path).text
        assert "<script>alert" not in page
        assert "<img src=x" not in page
        assert HOSTILE in text_of(page), path
    page = client.get("/ui/jobs/new", params={"name": HOSTILE, "dataset": HOSTILE}).text
    assert "<script>alert" not in page
    assert "<img src=x" not in page


@pytest.mark.parametrize("path", ["/", "/ui/jobs/new", "/ui/compare", "/ui/jobs/0"])
def test_pages_allow_nothing_but_their_own_files(client: TestClient, path: str) -> None:
    answer = client.get(path)
    policy = dict(
        part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    assert not re.search(r"<style|\sstyle=|\son\w+=", answer.text)
    for address in re.findall(r'(?:src|href)="([^"]+)"', answer.text):
        assert address.startswith(("/", "#")), address


def test_file_of_pages_is_compressed_once_for_all_requests(tmp_path: Path) -> None:
    (tmp_path / "a.js").write_text("let a = 1;\n" * 1000)
    files = StaticFiles(tmp_path)
    content_hash = files.url("a.js").split("/")[2]
    first, second = (files.read("a.js", content_hash=content_hash, compressed=True) for _ in "ab")
    assert first is not None and first is second
    assert gzip.decompress(first) == (tmp_path / "a.js").read_bytes()


def test_files_of_pages_are_kept_for_ever_under_the_name_of_their_content(
    client: TestClient,
) -> None:
    page = client.get("/").text
    urls = re.findall(r'(?:src|href)="(/static/[^"]+)"', page)
    assert len(urls) >= 5
    for url in urls:
        answer = client.get(url)
        assert answer.status_code == 200
        assert "immutable" in answer.headers["cache-control"]
        plain = client.get(url, headers={"Accept-Encoding": "identity"})
        assert (answer.headers["content-encoding"], plain.content) == ("gzip", answer.content)
        assert "content-encoding" not in plain.headers
        assert len(plain.content) == int(plain.headers["content-length"])
        assert "content-length" in answer.headers
        assert answer.headers["content-type"].split(";")[0] in (
            "text/css",
            "text/javascript",
            "image/svg+xml",
        )
    assert client.get("/static/0000000000000000/dashboard.css").status_code == 404
    assert client.get("/static/0000000000000000/..%2Fmain.py").status_code == 404


def test_api_knows_no_pages(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert "/" not in paths
    assert not [path for path in paths if path.startswith(("/ui", "/static"))]
