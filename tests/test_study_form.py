"""The form for a new study: its preview, its errors beside their fields, and what it posts."""

import html
import re
from typing import Any

import pytest
from conftest import BOTH_DATABASES
from fastapi.testclient import TestClient
from sqlalchemy import Engine
from stored_studies import store_study
from test_pages import OWN, text_of

pytestmark = BOTH_DATABASES


def test_form_tells_what_the_study_would_be(client: TestClient, engine: Engine) -> None:
    page = text_of(client.get("/ui/studies/new").text)
    assert "3 arms × 5 seeds = 15 jobs" in page
    assert "how long is not known before a first job has ended" in page
    store_study(engine, {"b": ["healthy"]})
    query = "options=b&grid_key_1=beta&grid_values_1=0.5, 1&grid_key_2=augment&grid_values_2=true"
    page = text_of(client.get(f"/ui/studies/new?{query}&num_seeds=10").text)
    assert "2 arms × 10 seeds = 20 jobs , about 0 s" in page
    assert "b beta=0.5 augment=true , b beta=1 augment=true" in page
    assert "Looks after 5, 10 seeds of each arm." in page
    page = text_of(client.get("/ui/studies/new?options=b&until_decided=true&max_seeds=20").text)
    assert "1 arm × 5 seeds = 5 jobs at first, at most 20" in page
    assert client.get("/studies").json()["data"][0]["num_jobs"] == 1


def test_study_of_the_form_is_the_one_of_the_api(client: TestClient, engine: Engine) -> None:
    client.put("/options/soft", json={"base": "b", "config": {"free_bits": 0.1}})
    assert 'value="soft"' in client.get("/ui/studies/new").text
    fields = {"options": ["b", "soft"], "name": "mine", "grid_key_2": "class_weighting",
              "grid_values_2": "sqrt_inverse, inverse", "until_decided": "true", "max_seeds": "12",
              "num_seeds": "7", "quick_test": "true", "num_samples": "400", "epochs": "",
              "reuse": "true"}  # fmt: skip
    answer = client.post("/ui/studies", data=fields, headers=OWN, follow_redirects=False)
    assert answer.status_code == 303
    posted = client.get(answer.headers["location"].removeprefix("/ui")).json()
    body = {"options": ["b", "soft"], "name": "mine", "quick_test": True, "reuse": True,
            "grid": {"class_weighting": ["sqrt_inverse", "inverse"]}, "until_decided": True,
            "max_seeds": 12, "config": {"num_samples": 400}}  # fmt: skip
    wanted = client.post("/studies", json=body).raise_for_status().json()
    assert [arm["config_sha256"] for arm in posted["arms"]] == [
        arm["config_sha256"] for arm in wanted["arms"]
    ]
    same = ("name", "quick_test", "reuse", "until_decided", "max_seeds", "seeds", "num_jobs")
    assert {key: posted[key] for key in same} == {key: wanted[key] for key in same}


@pytest.mark.parametrize(
    ("query", "place", "message"),
    [
        ("num_seeds=5", "Seeds of each arm", "choose at least one option"),
        ("options=a&num_seeds=0", "fixed", "greater than or equal to 1, not '0'"),
        ("options=a&num_seeds=x", "fixed", "not 'x'"),
        ("options=a&until_decided=true&max_seeds=101", "decided", "less than or equal to 100"),
        ("options=nonsense", "Seeds of each arm", "there is no option 'nonsense'"),
        ("options=a&grid_key_1=beta", "Setting 2", "needs at least one value"),
        ("options=a&grid_values_2=1", "Setting 3", "choose a setting for these values"),
        ("options=a&grid_key_2=beta&grid_values_2=1,-3", "Setting 3", "not -3"),
        ("options=a&grid_key_1=beta&grid_values_1=NaN", "Setting 2", "not 'NaN'"),
        ("options=a&grid_key_1=beta&grid_values_1=1,1", "Settings of all arms", "there twice"),
        ("options=a&epochs=0", "batch size", "greater than or equal to 1"),
        ("options=a&dataset=nowhere", "num samples", "nowhere"),
        ("options=a&options=b&options=c&num_seeds=100&grid_key_1=beta"
         "&grid_values_1=1,2,3,4,5,6,7", "Settings of all arms", "21 arms; 20 are allowed"),
    ],
)  # fmt: skip
def test_error_stands_beside_its_field(
    client: TestClient, query: str, place: str, message: str
) -> None:
    page = client.get(f"/ui/studies/new?{query}").text
    shown = text_of(page)
    assert message in shown[: shown.index("The study cannot be posted")]
    assert "× " not in shown[shown.index("The study cannot be posted") :]
    beside = re.findall(r'class="bad">([^<]+)<', page)
    assert len(beside) == 1
    assert message in html.unescape(beside[0])
    data = [(name, value) for name, _, value in (part.partition("=") for part in query.split("&"))]
    fields: dict[str, Any] = {}
    for name, value in data:
        fields.setdefault(name, []).append(value)
    assert client.post("/ui/studies", data=fields, headers=OWN).status_code == 422
    assert client.get("/studies").json()["data"] == []


def test_queue_that_is_full_takes_no_part_of_a_study(client: TestClient, app: Any) -> None:
    app.state.settings.max_queued_jobs = 3
    fields = {"options": ["a"], "num_seeds": "5"}
    assert client.post("/ui/studies", data=fields, headers=OWN).status_code == 429
    assert client.get("/jobs").json()["data"] == []
