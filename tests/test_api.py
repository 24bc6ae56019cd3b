"""The HTTP API: what scripts rely on."""

import io
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import BOTH_DATABASES, problem
from fastapi.testclient import TestClient
from PIL import Image

from server.models.configuration import TrainingConfig
from server.settings import Settings

pytestmark = BOTH_DATABASES

Finished = tuple[TestClient, dict[str, str]]


def test_posted_job_is_answered_with_its_whole_configuration(client: TestClient) -> None:
    response = client.post("/jobs", json={"option": "b", "quick_test": True})
    assert response.status_code == 201
    job = response.json()
    assert response.headers["location"] == f"/jobs/{job['id']}"
    assert job["status"] == "queued"
    assert job["config"].keys() == TrainingConfig.model_fields.keys()
    assert job["config"]["epochs"] == job["num_epochs"] == 5
    assert job["config"]["checkpoint_every"] == 1
    assert job["config"]["class_weighting"] == "sqrt_inverse"
    assert job["config"]["seed"] == 42
    assert client.get(f"/jobs/{job['id']}").json() == job


@pytest.mark.parametrize(
    ("option", "gamma", "weighting"),
    [("a", 2.0, "none"), ("b", 2.0, "sqrt_inverse"), ("c", 1.0, "inverse")],
)
def test_options_are_presets(client: TestClient, option: str, gamma: float, weighting: str) -> None:
    config = client.post("/jobs", json={"option": option}).json()["config"]
    assert (config["focal_gamma"], config["class_weighting"]) == (gamma, weighting)
    assert (config["epochs"], config["checkpoint_every"]) == (50, 5)


def test_what_is_sent_overrides_preset_and_quick_test(client: TestClient) -> None:
    body = {"option": "b", "quick_test": True, "epochs": 7, "class_weighting": "none", "seed": 3}
    config = client.post("/jobs", json=body).json()["config"]
    assert (config["epochs"], config["class_weighting"], config["seed"]) == (7, "none", 3)


def test_job_that_did_not_change_is_not_sent_again(client: TestClient) -> None:
    url = f"/jobs/{client.post('/jobs', json={'option': 'b'}).json()['id']}"
    etag = client.get(url).headers["etag"]
    again = client.get(url, headers={"If-None-Match": etag})
    assert (again.status_code, again.content) == (304, b"")
    client.post(f"{url}/cancel")
    changed = client.get(url, headers={"If-None-Match": etag})
    assert changed.json()["status"] == "cancelled"
    assert changed.headers["etag"] != etag


def test_long_answers_are_compressed(client: TestClient) -> None:
    client.post("/jobs", json={"option": "b"})
    assert client.get("/jobs").headers["content-encoding"] == "gzip"
    plain = client.get("/jobs", headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers


def test_list_is_newest_first_and_pages_are_stable_under_inserts(client: TestClient) -> None:
    ids = [client.post("/jobs", json={"option": "a"}).json()["id"] for _ in range(5)]
    first = client.get("/jobs", params={"limit": 2}).json()
    assert [job["id"] for job in first["data"]] == ids[:2:-1]
    assert first["has_more"]
    client.post("/jobs", json={"option": "a"})
    second = client.get("/jobs", params={"limit": 3, "after": ids[3]}).json()
    assert [job["id"] for job in second["data"]] == ids[2::-1]
    assert not second["has_more"]


def test_list_is_filtered(client: TestClient) -> None:
    kept = client.post(
        "/jobs", json={"option": "b", "name": "mine", "metadata": {"study": "one", "a b": "c"}}
    ).json()
    client.post("/jobs", json={"option": "a", "name": "other", "metadata": {"study": "two"}})
    for params in (
        {"option": "b"},
        {"name": "mine"},
        {"metadata[study]": "one"},
        {"metadata[a b]": "c", "status": "queued"},
    ):
        assert [job["id"] for job in client.get("/jobs", params=params).json()["data"]] == [
            kept["id"]
        ]
    assert client.get("/jobs", params={"status": "running"}).json()["data"] == []
    assert len(client.get("/jobs?status=running&status=queued").json()["data"]) == 2


def test_queued_job_is_cancelled_then_deleted(client: TestClient) -> None:
    job_id = client.post("/jobs", json={"option": "a"}).json()["id"]
    assert "cancel it" in problem(client.delete(f"/jobs/{job_id}"), 409)["detail"]
    for _ in range(2):
        response = client.post(f"/jobs/{job_id}/cancel")
        assert (response.status_code, response.json()["status"]) == (200, "cancelled")
    assert client.delete(f"/jobs/{job_id}").status_code == 204
    problem(client.get(f"/jobs/{job_id}"), 404)


def test_requests_that_change_jobs_do_not_wait_for_each_others_connections(
    client: TestClient,
) -> None:
    job_id = client.post("/jobs", json={"option": "a"}).json()["id"]
    with ThreadPoolExecutor(40) as threads:
        answers = list(threads.map(lambda _: client.post(f"/jobs/{job_id}/cancel"), range(80)))
    assert [answer.status_code for answer in answers] == [200] * 80


def test_job_whose_files_cannot_be_deleted_stays_to_be_deleted_again(
    client: TestClient, settings: Settings
) -> None:
    job_id = client.post("/jobs", json={"option": "a"}).json()["id"]
    client.post(f"/jobs/{job_id}/cancel")
    settings.runs_dir.mkdir(parents=True)
    # A file in the folder's place is an error for every user, even root.
    (settings.runs_dir / job_id).write_text("no folder")
    problem(client.delete(f"/jobs/{job_id}"), 500)
    assert client.get(f"/jobs/{job_id}").status_code == 200
    (settings.runs_dir / job_id).unlink()
    assert client.delete(f"/jobs/{job_id}").status_code == 204


def test_job_without_epochs_has_empty_lists_and_no_pictures(client: TestClient) -> None:
    job_id = client.post("/jobs", json={"option": "a"}).json()["id"]
    for name in ("metrics", "reconstructions", "checkpoints"):
        assert client.get(f"/jobs/{job_id}/{name}").json() == {"data": [], "has_more": False}
    assert client.get(f"/jobs/{job_id}/log").text == ""
    problem(client.get(f"/jobs/{job_id}/reconstructions/best.png"), 404)
    verdict = client.get(f"/jobs/{job_id}/verdict").json()
    assert verdict["outcome"] == "undecided"
    assert {criterion["status"] for criterion in verdict["criteria"]} == {"no_data"}


def test_finished_job_has_everything(finished: Finished) -> None:
    client, ids = finished
    job = client.get(f"/jobs/{ids['b']}").json()
    assert job["status"] == "succeeded"
    assert (job["epochs_completed"], job["progress"], job["error"]) == (2, 1.0, None)
    rows = client.get(f"/jobs/{ids['b']}/metrics").json()["data"]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert len(rows[0]["val_recall_per_colour"]) == 10
    log = client.get(f"/jobs/{ids['b']}/log").text
    assert "[VISUALIZATION] Saved: reconstructions_epoch_2.png" in log
    tail = client.get(f"/jobs/{ids['b']}/log", params={"tail": 2}).text
    assert tail == "".join(log.splitlines(keepends=True)[-2:])


def test_reconstructions_are_listed_and_served_with_their_hash(finished: Finished) -> None:
    client, ids = finished
    pictures = client.get(f"/jobs/{ids['b']}/reconstructions").json()["data"]
    assert [picture["epoch"] for picture in pictures] == [1, 2]
    assert sum(picture["is_best"] for picture in pictures) == 1
    assert len(pictures[0]["samples"]) == 10
    for picture in pictures:
        response = client.get(picture["url"])
        assert response.headers["content-type"] == "image/png"
        assert response.headers["x-content-type-options"] == "nosniff"
        etag = response.headers["etag"]
        assert etag == f'"{picture["sha256"]}"'
        with Image.open(io.BytesIO(response.content)) as image:
            assert image.format == "PNG"
        again = client.get(picture["url"], headers={"If-None-Match": etag})
        assert (again.status_code, again.content) == (304, b"")
        # A URL with the hash always gives the same bytes.
        assert "sha256=" in picture["url"]
        assert "immutable" in response.headers["cache-control"]
        plain = client.get(picture["url"].partition("?")[0])
        assert plain.headers["cache-control"] == "no-cache"
    base = f"/jobs/{ids['b']}/reconstructions"
    assert client.get(f"{base}/latest.png").content == client.get(f"{base}/2.png").content
    best = next(picture for picture in pictures if picture["is_best"])
    assert client.get(f"{base}/best.png").content == client.get(best["url"]).content


@pytest.mark.parametrize("epoch", ["99", "0", "-1", "x", "1e3", "%2e%2e", "1%00"])
@pytest.mark.usefixtures("no_traceback")
def test_picture_of_an_epoch_without_one_says_which_there_are(
    finished: Finished, epoch: str
) -> None:
    client, ids = finished
    for path in (f"reconstructions/{epoch}.png", f"checkpoints/{epoch}"):
        answer = problem(client.get(f"/jobs/{ids['b']}/{path}"), 404)
        if epoch == "99":
            assert "there are best, latest and 1, 2" in answer["detail"]


def test_checkpoints_are_listed_with_metrics_and_downloaded(finished: Finished) -> None:
    client, ids = finished
    checkpoints = client.get(f"/jobs/{ids['a']}/checkpoints").json()["data"]
    assert [checkpoint["epoch"] for checkpoint in checkpoints] == [1, 2]
    assert checkpoints[0]["metrics"]["epoch"] == 1
    response = client.get(checkpoints[0]["url"])
    assert len(response.content) == checkpoints[0]["size_bytes"]
    assert "attachment" in response.headers["content-disposition"]
    assert client.get(f"/jobs/{ids['a']}/checkpoints/best").status_code == 200


def test_verdict_has_the_shape_that_scripts_rely_on(finished: Finished) -> None:
    client, ids = finished
    verdict = client.get(f"/jobs/{ids['a']}/verdict").json()
    assert verdict["job_id"] == ids["a"]
    assert verdict["outcome"] == "failure"
    names = [criterion["name"] for criterion in verdict["criteria"]]
    assert names == [
        "accuracy_in_range",
        "not_mode_collapsed",
        "kl_per_dimension",
        "loss_decreases",
        "stable",
        "completed",
    ]
    for criterion in verdict["criteria"]:
        assert {"name", "status", "value", "target", "epochs", "explanation"} <= criterion.keys()


def test_thresholds_in_the_query_judge_again(finished: Finished) -> None:
    client, ids = finished
    lenient = {"min_accuracy": 0, "max_accuracy": 1}
    verdict = client.get(f"/jobs/{ids['a']}/verdict", params=lenient).json()
    assert verdict["criteria"][0]["status"] == "passed"
    problem(client.get(f"/jobs/{ids['a']}/verdict", params={"min_accuracy": 2}), 422)
    crossed = {"min_accuracy": 0.9, "max_accuracy": 0.1}
    problem(client.get(f"/jobs/{ids['a']}/verdict", params=crossed), 422)
    problem(client.get(f"/jobs/{ids['a']}/verdict", params={"nope": 1}), 422)


def test_comparison_by_id_and_by_option_is_the_same(finished: Finished) -> None:
    client, ids = finished
    by_option = client.get("/comparisons", params={"options": "a,b,c"}).json()
    by_id = client.get("/comparisons", params={"job_id": [ids[o] for o in "abc"]}).json()
    assert by_option == by_id
    assert [entry["job"]["option"] for entry in by_id["jobs"]] == ["a", "b", "c"]
    assert sorted(by_id["ranking"]) == sorted(ids.values())
    assert by_id["recommendation"] is None
    assert by_id["reason"]
    assert by_id["differences"]["class_weighting"] == {
        ids["a"]: "none",
        ids["b"]: "sqrt_inverse",
        ids["c"]: "inverse",
    }
    assert "epochs" not in by_id["differences"]


@pytest.mark.parametrize(
    ("query", "status", "words"),
    [
        ("", 422, "job_id"),
        ("options=a,x", 422, "allowed are a, b, c"),
        ("options=a&job_id=0", 422, "not both"),
        ("job_id=0123456789ab", 404, "there is no job"),
        ("options=a&min_accuracy=x", 422, "min_accuracy"),
    ],
)
@pytest.mark.usefixtures("no_traceback")
def test_bad_comparison_is_refused(finished: Finished, query: str, status: int, words: str) -> None:
    client, _ = finished
    assert words in problem(client.get(f"/comparisons?{query}"), status)["detail"]


def test_comparison_of_an_option_without_success_names_it(client: TestClient) -> None:
    client.post("/jobs", json={"option": "a"})
    answer = problem(client.get("/comparisons?options=a"), 404)
    assert "no job of option a has succeeded" in answer["detail"]


def test_compared_jobs_of_one_name_are_shown_with_their_ids(client: TestClient) -> None:
    body = {"option": "a", "name": "study"}
    ids = [client.post("/jobs", json=body | {"seed": seed}).json()["id"] for seed in (1, 2)]
    report = client.get("/comparisons/report.html", params={"job_id": ids}).text
    page = client.get("/ui/compare", params={"job_id": ids}).text
    for job_id in ids:
        assert f"study ({job_id})" in report
        assert f"study ({job_id})" in page


def test_reports_are_complete_and_need_nothing_from_outside(finished: Finished) -> None:
    client, _ = finished
    curves = client.get("/comparisons/curves.png?options=a,b,c")
    with Image.open(io.BytesIO(curves.content)) as image:
        assert image.width >= 1000
    html = client.get("/comparisons/report.html?options=a,b,c")
    assert html.headers["content-type"].startswith("text/html")
    assert html.text.count("data:image/png;base64,") == 4
    assert not re.search(r"(src|href)=\"?(https?:)?//", html.text)
    markdown = client.get("/comparisons/report.md?options=a,b,c")
    assert "accuracy_in_range" in markdown.text


def test_options_workers_and_health(finished: Finished) -> None:
    client, _ = finished
    options = client.get("/options").json()["data"]
    assert [entry["option"] for entry in options] == ["a", "b", "c"]
    (worker,) = client.get("/workers").json()["data"]
    assert worker["state"] == "stopped"
    assert {"id", "host", "pid", "device", "job_id", "heartbeat_at", "state"} <= worker.keys()
    assert client.get("/healthz").json()["status"] == "ok"


def test_times_are_utc_with_their_zone(finished: Finished) -> None:
    client, ids = finished
    job = client.get(f"/jobs/{ids['a']}").json()
    for name in ("created_at", "started_at", "ended_at"):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+(Z|\+00:00)", job[name])


def test_every_example_in_the_openapi_document_works(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    examples = document["components"]["schemas"]["JobRequest"]["examples"]
    assert len(examples) >= 3
    for example in examples:
        response = client.post("/jobs", json=example)
        assert response.status_code == 201, response.text


def test_fault_of_the_server_is_a_problem_without_traceback(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    client.app.add_api_route("/faulty", lambda: 1 / 0)  # type: ignore[attr-defined]
    answer = problem(client.get("/faulty"), 500)
    assert "Traceback" not in str(answer)
    assert answer["request_id"] in caplog.text
