"""Options: the built-in ones, and those that users add, use and delete."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from conftest import BOTH_DATABASES, TINY, drain, open_client, problem
from fastapi.testclient import TestClient
from httpx2 import Response
from sqlalchemy import Engine
from stored_state import read_state

from server.database.engine import write_transaction
from server.jobs import options
from server.main import create_app
from server.models.configuration import TrainingConfig
from server.models.studies import Study
from server.settings import Settings
from server.tokens import ApiToken, TokenScope

pytestmark = BOTH_DATABASES

SOFT: dict[str, Any] = {"base": "b", "config": {"free_bits": 0.1}, "summary": "b with free bits"}
HOSTILE = "<img src=x onerror=alert(1)>"
BAD_NAMES = [
    *("%2e%2e", "%2e", "..%2fa", "a%00", "%00", "a%0ab", "a%20b", "%3Cscript%3E", "_x", "-x"),
    *("x" * 65, "%C3%A9", "a.b"),
]
UNKNOWN = ["d", "..", "a%00", "%3Cb%3E", "x" * 80]


def put(client: TestClient, name: str = "b_soft", **changes: Any) -> Response:
    return client.put(f"/options/{name}", json=SOFT | changes)


def list_names(client: TestClient) -> list[str]:
    answer = client.get("/options").raise_for_status().json()
    assert not answer["has_more"]
    return [option["name"] for option in answer["data"]]


def post(client: TestClient, option: str, **body: Any) -> dict[str, Any]:
    answer = client.post("/jobs", json={"option": option, **TINY, **body})
    job: dict[str, Any] = answer.raise_for_status().json()
    return job


def read_fields(answer: Response) -> list[str]:
    return [error["field"] for error in problem(answer, 422)["errors"]]


# -- adding, listing and deleting


def test_built_in_options_are_listed_with_their_whole_configuration(client: TestClient) -> None:
    listed = client.get("/options").json()["data"]
    assert [option["name"] for option in listed] == ["a", "b", "c"]
    for option in listed:
        assert option["is_built_in"]
        assert option["base"] is None
        assert option["config"].keys() == TrainingConfig.model_fields.keys()
        assert option["config"].items() >= option["overrides"].items()
        assert option["summary"]
        assert option == client.get(f"/options/{option['name']}").json()


def test_own_option_is_its_base_with_its_own_settings(client: TestClient) -> None:
    answer = put(client)
    assert (answer.status_code, answer.headers["location"]) == (201, "/options/b_soft")
    shown = client.get("/options/b_soft").raise_for_status().json()
    assert shown == answer.json()
    assert (shown["base"], shown["is_built_in"]) == ("b", False)
    assert shown["overrides"] == {"free_bits": 0.1}
    assert shown["summary"] == "b with free bits"
    base = client.get("/options/b").json()["config"]
    assert shown["config"] == base | {"free_bits": 0.1}


def test_own_options_are_listed_by_name_after_those_built_in(client: TestClient) -> None:
    for name in ("b2", "B2", "a_b", "a-b", "0"):
        put(client, name).raise_for_status()
    assert list_names(client) == ["a", "b", "c", "0", "B2", "a-b", "a_b", "b2"]


def test_own_option_may_be_the_base_of_another(client: TestClient) -> None:
    put(client).raise_for_status()
    answer = put(client, "softer", base="b_soft", config={"beta": 0.5})
    shown = answer.raise_for_status().json()
    assert (shown["base"], shown["overrides"]) == ("b_soft", {"beta": 0.5})
    assert (
        shown["config"].items()
        >= {
            "free_bits": 0.1,
            "beta": 0.5,
            "class_weighting": "sqrt_inverse",
        }.items()
    )


def test_option_without_settings_or_summary_is_its_base(client: TestClient) -> None:
    answer = client.put("/options/twin", json={"base": "c"})
    assert answer.status_code == 201
    assert answer.json()["config"] == client.get("/options/c").json()["config"]
    assert (answer.json()["overrides"], answer.json()["summary"]) == ({}, "")


def test_number_of_jobs_is_counted(client: TestClient) -> None:
    put(client).raise_for_status()
    for option in ("b", "b_soft", "b_soft"):
        post(client, option)
    listed = {
        option["name"]: option["num_jobs"] for option in client.get("/options").json()["data"]
    }
    assert listed == {"a": 0, "b": 1, "c": 0, "b_soft": 2}
    assert client.get("/options/b_soft").json()["num_jobs"] == 2


def test_same_option_again_is_welcome(client: TestClient) -> None:
    first = put(client)
    again = put(client)
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json()
    # The same configuration, written otherwise: 2 is the default and that of the base.
    otherwise = put(client, config={"free_bits": 0.1, "focal_gamma": 2, "latent_dim": 10})
    assert (otherwise.status_code, otherwise.json()) == (200, first.json())


def test_option_never_changes_but_for_its_summary(client: TestClient) -> None:
    first = put(client).json()
    for changes in ({"config": {"free_bits": 0.2}}, {"config": {}}, {"base": "c"}):
        answer = problem(put(client, **changes), 409)
        assert "with other settings" in answer["detail"]
        assert client.get("/options/b_soft").json() == first
    put(client, summary="softer").raise_for_status()
    assert client.get("/options/b_soft").json() == first | {"summary": "softer"}
    put(client, summary="").raise_for_status()
    assert client.get("/options/b_soft").json()["summary"] == "softer"


def test_built_in_option_can_neither_be_changed_nor_deleted(
    client: TestClient, engine: Engine, settings: Settings
) -> None:
    before = read_state(engine, settings)
    for name in "abc":
        assert "built in" in problem(put(client, name), 409)["detail"]
        assert "built in" in problem(client.delete(f"/options/{name}"), 409)["detail"]
    assert read_state(engine, settings) == before


def test_same_option_at_the_same_time_is_added_once(client: TestClient) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: put(client), range(16)))
    assert sorted(answer.status_code for answer in answers) == [200] * 15 + [201]


def test_different_options_of_one_name_at_the_same_time_are_not_mixed(client: TestClient) -> None:
    values = [number / 100 for number in range(16)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda value: put(client, config={"free_bits": value}), values))
    assert sorted(answer.status_code for answer in answers) == [201] + [409] * 15
    (added,) = [answer for answer in answers if answer.status_code == 201]
    assert client.get("/options/b_soft").json() == added.json()


def test_deleted_option_makes_its_name_free(client: TestClient) -> None:
    put(client).raise_for_status()
    assert client.delete("/options/b_soft").status_code == 204
    assert list_names(client) == ["a", "b", "c"]
    problem(client.get("/options/b_soft"), 404)
    problem(client.delete("/options/b_soft"), 404)
    assert put(client, config={"free_bits": 0.2}).status_code == 201


def test_option_that_another_one_names_stays(client: TestClient) -> None:
    put(client).raise_for_status()
    put(client, "softer", base="b_soft", config={}).raise_for_status()
    assert "option softer names" in problem(client.delete("/options/b_soft"), 409)["detail"]
    client.delete("/options/softer").raise_for_status()
    client.delete("/options/b_soft").raise_for_status()


def test_option_that_a_study_names_stays(client: TestClient, engine: Engine) -> None:
    config = put(client).raise_for_status().json()["config"]
    arm = {"name": "x", "option": "b_soft", "config": config, "config_sha256": ""}
    study = Study(arms=[arm], seeds=[0], looks=[1], num_planned_looks=1, max_seeds=1, thresholds={})
    with write_transaction(engine) as session:
        session.add(study)
    assert f"study {study.id} names" in problem(client.delete("/options/b_soft"), 409)["detail"]
    assert "b_soft" in list_names(client)


def test_options_are_not_more_than_can_be_chosen_from(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "MAX_OWN_OPTIONS", 2)
    for name in ("x", "y"):
        put(client, name).raise_for_status()
    assert "there are 2 own options already" in problem(put(client, "z"), 409)["detail"]
    assert put(client, "x").status_code == 200
    client.delete("/options/x").raise_for_status()
    assert put(client, "z").status_code == 201


def test_options_that_arrive_together_do_not_pass_the_limit(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(options, "MAX_OWN_OPTIONS", 2)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda index: put(client, f"x{index}"), range(16)))
    assert sorted(answer.status_code for answer in answers) == [201] * 2 + [409] * 14


# -- what is refused


def test_option_without_a_base_is_refused(client: TestClient) -> None:
    assert read_fields(client.put("/options/x", json={"config": {}})) == ["base"]


@pytest.mark.usefixtures("no_traceback")
def test_name_that_is_none_is_refused(
    client: TestClient, engine: Engine, settings: Settings
) -> None:
    before = read_state(engine, settings)
    for name in BAD_NAMES:
        assert put(client, name).status_code in (404, 422), name
        assert client.get(f"/options/{name}").status_code in (404, 422), name
        assert client.delete(f"/options/{name}").status_code in (404, 422), name
    assert read_state(engine, settings) == before


@pytest.mark.usefixtures("no_traceback")
def test_refused_name_is_named(client: TestClient) -> None:
    assert read_fields(put(client, "a%20b")) == ["name"]
    assert "there is no option 'nope'" in problem(client.get("/options/nope"), 404)["detail"]


def test_longest_name_is_allowed(client: TestClient) -> None:
    name = "x" * 64
    put(client, name).raise_for_status()
    assert post(client, name)["option"] == name
    assert name in client.get("/").text


@pytest.fixture
def guarded(settings: Settings) -> Iterator[TestClient]:
    """A service for a reader."""
    token = ApiToken.of("secret", name="reader", scope=TokenScope.read)
    app = create_app(settings.model_copy(update={"api_tokens": (token,)}))
    with open_client(app) as client:
        client.headers["Authorization"] = "Bearer secret"
        yield client


def test_reader_can_neither_add_nor_delete(guarded: TestClient) -> None:
    problem(put(guarded), 403)
    problem(guarded.delete("/options/b_soft"), 403)
    assert list_names(guarded) == ["a", "b", "c"]


# -- use


def test_job_of_an_own_option_has_its_configuration(client: TestClient) -> None:
    put(client, config={"free_bits": 0.1, "epochs": 9}).raise_for_status()
    config = client.post("/jobs", json={"option": "b_soft", "seed": 7}).json()["config"]
    shown = client.get("/options/b_soft").json()["config"]
    assert config == shown | {"seed": 7, "data_seed": 7}
    # Later ones count: the option, the quick test, the request.
    quick = client.post("/jobs", json={"option": "b_soft", "quick_test": True, "beta": 2}).json()
    assert (quick["config"]["epochs"], quick["config"]["beta"]) == (5, 2.0)
    assert quick["config"]["free_bits"] == 0.1


def test_unknown_option_of_a_job_is_answered_with_those_there_are(client: TestClient) -> None:
    put(client).raise_for_status()
    answer = client.post("/jobs", json={"option": "b_sof"})
    assert read_fields(answer) == ["option"]
    assert "allowed are a, b, c, b_soft. PUT /options/b_sof adds it" in answer.json()["detail"]
    assert client.get("/jobs").json()["data"] == []


def test_message_names_some_of_many_options(client: TestClient) -> None:
    for number in range(30):
        put(client, f"x{number:02d}").raise_for_status()
    detail = problem(client.post("/jobs", json={"option": "y"}), 422)["detail"]
    assert "x16 and " in detail and detail.count("more") == 1
    assert "x17" not in detail


def test_data_set_of_an_option_is_checked_when_a_job_needs_it(
    client: TestClient, write_npz: Callable[..., str]
) -> None:
    put(client, config={"dataset": "mine"}).raise_for_status()
    assert read_fields(client.post("/jobs", json={"option": "b_soft"})) == ["dataset"]
    write_npz(images=np.zeros((20, 8, 8), dtype=np.uint8))
    assert post(client, "b_soft")["config"]["dataset"] == "mine"


def test_jobs_are_listed_by_their_own_option_even_when_it_is_deleted(client: TestClient) -> None:
    put(client).raise_for_status()
    job = post(client, "b_soft")
    post(client, "b")

    def list_jobs() -> list[str]:
        page = client.get("/jobs?option=b_soft").raise_for_status().json()
        return [each["id"] for each in page["data"]]

    assert list_jobs() == [job["id"]]
    client.delete("/options/b_soft").raise_for_status()
    assert list_jobs() == [job["id"]]
    assert client.get(f"/jobs/{job['id']}").json() == job


@pytest.mark.usefixtures("no_traceback")
def test_list_of_an_unknown_option_is_refused(client: TestClient) -> None:
    for query in [*UNKNOWN, "", "a,b"]:
        assert read_fields(client.get(f"/jobs?option={query}")) == ["option"], query


def test_own_option_is_compared_even_when_it_is_deleted(
    client: TestClient, settings: Settings, engine: Engine
) -> None:
    put(client).raise_for_status()
    ids = {option: post(client, option, epochs=1)["id"] for option in ("b", "b_soft")}
    drain(settings, engine)

    def compare() -> list[str]:
        comparison = client.get("/comparisons?options=b_soft, b").raise_for_status().json()
        assert comparison["differences"]["free_bits"] == {ids["b_soft"]: 0.1, ids["b"]: 0.0}
        return [entry["job"]["id"] for entry in comparison["jobs"]]

    assert compare() == [ids["b_soft"], ids["b"]]
    client.delete("/options/b_soft").raise_for_status()
    assert compare() == [ids["b_soft"], ids["b"]]


@pytest.mark.usefixtures("no_traceback")
def test_comparison_of_an_unknown_option_is_refused(client: TestClient) -> None:
    for query in [*UNKNOWN, "a,d", "a,,b", "a,"]:
        assert read_fields(client.get(f"/comparisons?options={query}")) == ["options"], query


def test_comparison_of_too_many_options_is_refused(client: TestClient) -> None:
    names = ",".join(f"x{number}" for number in range(101))
    answer = client.get(f"/comparisons?options={names}")
    assert read_fields(answer) == ["options"]
    assert "at most 100" in answer.json()["detail"]


def test_option_without_a_finished_job_cannot_be_compared(client: TestClient) -> None:
    put(client).raise_for_status()
    post(client, "b_soft")
    answer = problem(client.get("/comparisons?options=b_soft"), 404)
    assert "no job of option b_soft has succeeded yet" in answer["detail"]


# -- pages


def test_form_offers_own_options_and_posts_them(client: TestClient) -> None:
    put(client, summary=HOSTILE).raise_for_status()
    for path in ("/", "/ui/jobs/new"):
        page = client.get(path).text
        assert '<input type="radio" name="option" value="b_soft"' in page
        assert HOSTILE not in page
        assert "&lt;img src=x" in page
    page = client.get("/ui/jobs/new?option=b_soft").text
    assert 'value="b_soft" checked' in page
    assert "<dt>free bits</dt><dd>0.1</dd>" in page
    own = {"Sec-Fetch-Site": "same-origin"}
    answer = client.post("/ui/jobs", data={"option": "b_soft"}, headers=own, follow_redirects=False)
    job = client.get(answer.headers["location"].removeprefix("/ui")).json()
    assert (job["option"], job["config"]["free_bits"]) == ("b_soft", 0.1)


@pytest.mark.usefixtures("no_traceback")
def test_form_says_that_an_option_is_unknown(client: TestClient) -> None:
    for option in UNKNOWN:
        answer = client.get(f"/ui/jobs/new?option={option}")
        assert answer.status_code == 200
        assert "The job cannot be posted" in answer.text
        assert "<strong>option</strong>" in answer.text
        assert "checked" not in answer.text


def test_page_of_jobs_is_filtered_by_an_own_option_even_when_it_is_deleted(
    client: TestClient,
) -> None:
    put(client).raise_for_status()
    jobs = {option: post(client, option)["id"] for option in ("b", "b_soft")}
    assert '<option value="b_soft">b_soft</option>' in client.get("/").text
    for _ in range(2):
        page = client.get("/?option=b_soft").text
        assert '<option value="b_soft" selected>b_soft</option>' in page
        assert f'id="job-{jobs["b_soft"]}"' in page
        assert f'id="job-{jobs["b"]}"' not in page
        client.delete("/options/b_soft")
    assert 'value="b_soft"' not in client.get("/").text


@pytest.mark.usefixtures("no_traceback")
def test_page_of_jobs_of_an_unknown_option_shows_all(client: TestClient) -> None:
    job = post(client, "b")
    for option in UNKNOWN:
        page = client.get(f"/?option={option}&status=")
        assert page.status_code == 200
        assert f'id="job-{job["id"]}"' in page.text
        assert "selected" not in page.text
