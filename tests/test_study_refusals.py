"""Studies that cannot be: each refusal names the field and the limit, and stores nothing."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import BOTH_DATABASES, problem
from fastapi.testclient import TestClient
from sqlalchemy import Engine
from stored_state import read_state

from server.settings import Settings

pytestmark = [BOTH_DATABASES, pytest.mark.usefixtures("no_traceback")]

Json = dict[str, Any]
B = {"options": ["b"]}
SOFT = {"name": "soft", "base": "b"}

#: The body, the field that is wrong, and words of the message.
REFUSED: list[tuple[Json, str, str]] = [
    ({}, "options", "required"),
    ({"options": []}, "options", "at least 1 item"),
    ({"options": ["a"] * 21}, "options", "at most 20 items"),
    ({"options": "b"}, "options", "list"),
    ({"options": ["d"]}, "options.0", "allowed are a, b, c"),
    ({"options": ["b", "b"]}, "options", "'b' is there twice"),
    ({"options": [5]}, "options.0", "must be the name of an option, or an arm"),
    ({"options": [["b"]]}, "options.0", "must be the name of an option, or an arm"),
    ({"options": ["a\0"]}, "options.0", "pattern"),
    ({"options": [{"base": "b"}]}, "options.0.name", "required"),
    ({"options": [{"name": "x", "base": "nope"}]}, "options.0.base", "allowed are a, b, c"),
    ({"options": [{"name": "a", "base": "b"}]}, "options.0.name", "use another name"),
    ({"options": [{"name": "", "base": "b"}]}, "options.0.name", "at least 1"),
    ({"options": [{"name": "x\0y", "base": "b"}]}, "options.0.name", "pattern"),
    ({"options": [{"name": "x" * 65, "base": "b"}]}, "options.0.name", "at most 64"),
    ({"options": [SOFT | {"config": {"beta": -1}}]}, "options.0.config.beta", "equal to 0"),
    ({"options": [SOFT | {"config": {"seed": 1}}]}, "options.0.config.seed", "belongs to a job"),
    ({"options": [SOFT | {"confg": {}}]}, "options.0.confg", "did you mean config?"),
    ({"options": [SOFT, {**SOFT, "config": {"beta": 2}}]}, "options", "'soft' is there twice"),
    ({"options": ["b", SOFT]}, "options", "'b' and 'soft' have the same configuration"),
    (B | {"grid": {"bta": [1]}}, "grid.bta", "no such setting"),
    (B | {"grid": {"seed": [1]}}, "grid.seed", "same seeds"),
    (B | {"grid": {"data_seed": [1]}}, "grid.data_seed", "same seeds"),
    (B | {"grid": {"x" * 5000: [1]}}, "grid." + "x" * 50, "no such setting"),
    (B | {"grid": {"beta": []}}, "grid.beta", "at least one value"),
    (B | {"grid": {"beta": 1}}, "grid.beta", "list"),
    (B | {"grid": {"beta": [1, "2"]}}, "grid.beta.1", "must be a number"),
    (B | {"grid": {"beta": [1, [2]]}}, "grid.beta.1", "must be a number, a text, true or false"),
    (B | {"grid": {"beta": [{"x": 1}]}}, "grid.beta.0", "must be a number, a text"),
    (B | {"grid": {"beta": [None]}}, "grid.beta.0", "must be a number, a text"),
    (B | {"grid": {"beta": [1, 1e300]}}, "grid.beta.1", "less than or equal to 1000"),
    (B | {"grid": {"beta": [10**40]}}, "grid.beta.0", "less than or equal to 1000"),
    (B | {"grid": {"epochs": [1.5]}}, "grid.epochs.0", "integer"),
    (B | {"grid": {"augment": [1]}}, "grid.augment.0", "true or false"),
    (B | {"grid": {"class_weighting": ["x" * 5000]}}, "grid.class_weighting.0", "inverse"),
    (B | {"grid": {"beta": [1, 1.0]}}, "grid", "have the same configuration"),
    (B | {"grid": {"checkpoint_every": [1, 2]}}, "grid", "have the same configuration"),
    ({"options": ["b"], "grid": {"effective_number_beta": [0.9, 0.99]}}, "grid", "no effect"),
    (
        {"options": ["a"], "config": {"use_focal_loss": False}, "grid": {"focal_gamma": [1, 2]}},
        "grid",
        "no effect",
    ),
    (B | {"grid": {"class_weighting": ["inverse", "balanced"]}}, "grid", "no effect"),
    (
        B | {"config": {"beta_schedule": "constant"}, "grid": {"beta_warmup_fraction": [0.1, 0.2]}},
        "grid",
        "no effect",
    ),
    (B | {"grid": {"beta": list(range(21))}}, "grid", "21 arms; 20 are allowed"),
    (B | {"grid": {"beta": [1] * 9000, "focal_gamma": [1] * 9000}}, "grid", "20 are allowed"),
    (B | {"grid": {"dataset": ["atomic", "nope"]}}, "grid.dataset.1", "atomic, arc"),
    (B | {"config": {"dataset": "nope"}}, "config.dataset", "atomic, arc"),
    ({"options": [SOFT | {"config": {"dataset": "nope"}}]}, "options.0.config.dataset", "arc"),
    (B | {"config": {"dataset": "../../x"}}, "config.dataset", "pattern"),
    (B | {"config": {"epochs": 1001}}, "config.epochs", "1000"),
    (B | {"config": {"epohcs": 5}}, "config.epohcs", "did you mean epochs?"),
    (B | {"config": {"seed": 1}}, "config.seed", "`seeds` or `num_seeds`"),
    (B | {"config": {"data_seed": "1"}}, "config.data_seed", "must be a number"),
    (B | {"config": {"data_seed": True}}, "config.data_seed", "must be a number"),
    (B | {"config": {"data_seed": -1}}, "config.data_seed", "equal to 0"),
    (B | {"config": []}, "config", "dictionary"),
    (B | {"num_seeds": 0}, "num_seeds", "equal to 1"),
    (B | {"num_seeds": 101}, "num_seeds", "equal to 100"),
    (B | {"num_seeds": "5"}, "num_seeds", "must be a number"),
    (B | {"num_seeds": True}, "num_seeds", "must be a number"),
    (B | {"num_seeds": 10**300}, "num_seeds", "100"),
    (B | {"num_seeds": 2, "seeds": [1]}, "seeds", "not both"),
    (B | {"seeds": []}, "seeds", "at least 1 item"),
    (B | {"seeds": [1, 2, 1]}, "seeds", "only once"),
    (B | {"seeds": list(range(101))}, "seeds", "at most 100 items"),
    (B | {"seeds": [-1]}, "seeds.0", "equal to 0"),
    (B | {"seeds": [2**31]}, "seeds.0", "2147483647"),
    (B | {"seeds": ["1"]}, "seeds.0", "must be a number"),
    (B | {"seeds": [True]}, "seeds.0", "must be a number"),
    (B | {"seeds": [1.5]}, "seeds.0", "integer"),
    (B | {"max_seeds": 10}, "max_seeds", "only a race"),
    (B | {"until_decided": True, "max_seeds": 101}, "max_seeds", "equal to 100"),
    (B | {"until_decided": True, "num_seeds": 6, "max_seeds": 5}, "num_seeds", "at most"),
    (B | {"until_decided": True, "seeds": [1]}, "seeds", "a race"),
    (B | {"until_decided": "yes"}, "until_decided", "true or false"),
    (B | {"reuse": 1}, "reuse", "true or false"),
    (B | {"quick_test": None}, "quick_test", "true or false"),
    (B | {"thresholds": {"min_accuracy": "0.5"}}, "thresholds.min_accuracy", "must be a number"),
    (B | {"thresholds": {"min_accuracy": 2}}, "thresholds.min_accuracy", "equal to 1"),
    (B | {"thresholds": {"min_acuracy": 0.5}}, "thresholds.min_acuracy", "min_accuracy?"),
    (B | {"thresholds": {"min_accuracy": 0.9}}, "thresholds", "must not be above"),
    (B | {"name": ""}, "name", "at least 1"),
    (B | {"name": "a\0b"}, "name", "pattern"),
    (B | {"name": "two\nlines"}, "name", "pattern"),
    (B | {"name": 5}, "name", "string"),
    (B | {"metadata": {"k": "v" * 513}}, "metadata.k", "512"),
    (B | {"metadata": {"k": "a\0b"}}, "metadata.k", "pattern"),
    (B | {"metadata": {"k": "v" * 500, "l": "\u00e9" * 262}}, "metadata", "1024 bytes in UTF-8"),
    (B | {"priority": 101}, "priority", "100"),
    (B | {"num_seed": 5}, "num_seed", "unknown field; did you mean num_seeds?"),
    (B | {"beta": 1}, "beta", "unknown field; did you mean config.beta?"),
    (B | {"zzz": 1}, "zzz", "unknown field; see"),
]


@pytest.mark.parametrize(("body", "field", "words"), REFUSED)
def test_bad_study_is_refused_with_its_field_and_what_is_allowed(
    client: TestClient,
    engine: Engine,
    settings: Settings,
    body: Json,
    field: str,
    words: str,
) -> None:
    before = read_state(engine, settings)
    answer = problem(client.post("/studies", json=body), 422)
    assert [error["field"] for error in answer["errors"]] == [field]
    assert words in answer["errors"][0]["message"]
    assert len(answer["detail"]) < 1000
    assert read_state(engine, settings) == before


def test_labels_have_a_bound_that_a_job_of_its_own_has_higher(client: TestClient) -> None:
    labels = {f"{number:02}": "\u20ac" * 20 for number in range(16)}
    assert client.post("/studies", json={**B, "metadata": labels}).status_code == 201
    labels |= {"15": "\u20ac" * 40}
    assert sum(len(key) + len(value.encode()) for key, value in labels.items()) == 1052
    problem(client.post("/studies", json={**B, "metadata": labels}), 422)
    assert client.post("/jobs", json={"option": "b", "metadata": labels}).status_code == 201
    labels = {f"{number:02}": "\u20ac" * 85 for number in range(16)}
    errors = problem(client.post("/jobs", json={"option": "b", "metadata": labels}), 422)["errors"]
    assert [error["field"] for error in errors] == ["metadata"]
    assert "at most 4096 bytes in UTF-8, not 4112" in errors[0]["message"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize(
    ("body", "field"),
    [
        ('{"options": ["b"], "grid": {"beta": [%s]}}', "grid.beta.0"),
        ('{"options": ["b"], "config": {"beta": %s}}', "config.beta"),
        ('{"options": ["b"], "num_seeds": %s}', "num_seeds"),
        ('{"options": ["b"], "seeds": [%s]}', "seeds.0"),
        ('{"options": ["b"], "thresholds": {"max_loss_rise": %s}}', "thresholds.max_loss_rise"),
    ],
)
def test_numbers_must_be_finite(client: TestClient, body: str, field: str, number: str) -> None:
    headers = {"Content-Type": "application/json"}
    answer = client.post("/studies", content=body % number, headers=headers)
    assert [error["field"] for error in problem(answer, 422)["errors"]] == [field]
    assert client.get("/studies").json()["data"] == []


def test_unknown_parameter_is_refused_rather_than_queue_what_was_to_be_planned(
    client: TestClient,
) -> None:
    answer = problem(client.post("/studies?dryrun=true", json=B), 422)
    assert "known are dry_run" in answer["errors"][0]["message"]
    problem(client.get("/studies?metadata[k]=v"), 422)
    assert client.get("/studies").json()["data"] == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"b"', b"null", b"\xff\xfe"])
def test_body_that_is_no_json_object_is_refused(client: TestClient, content: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    answer = client.post("/studies", content=content, headers=headers)
    assert answer.status_code in (400, 422)


def test_body_of_many_values_is_answered_with_the_limit(client: TestClient) -> None:
    body = B | {"grid": {"beta": list(range(9000))}}
    assert 2**15 < len(json.dumps(body)) < 2**16
    answer = problem(client.post("/studies", json=body), 422)
    assert answer["errors"][0]["field"] == "grid.beta.1001"
    body = B | {"grid": {"beta": [number % 1000 for number in range(9000)]}}
    answer = problem(client.post("/studies", json=body), 422)
    assert answer["errors"][0]["message"] == "9000 arms; 20 are allowed"


def test_body_is_neither_longer_nor_deeper_than_allowed(client: TestClient) -> None:
    body = {**B, "metadata": {"k": "v" * 2**16}}
    assert client.post("/studies", json=body).status_code == 413
    text = '{"options": ["b"], "grid": {"beta": ' + "[" * 10_000 + "]" * 10_000 + "}}"
    headers = {"Content-Type": "application/json"}
    answer = client.post("/studies", content=text, headers=headers)
    assert answer.status_code in (400, 422)
    assert client.get("/studies").json()["data"] == []


def test_data_set_that_is_broken_is_refused_by_the_field_that_names_it(
    client: TestClient, write_npz: Callable[..., str]
) -> None:
    name = write_npz(images=np.full((20, 8, 8), 11, dtype=np.uint8))
    answer = problem(client.post("/studies", json=B | {"config": {"dataset": name}}), 422)
    assert [error["field"] for error in answer["errors"]] == ["config.dataset"]
    client.put("/options/own", json={"base": "b", "config": {"dataset": name}}).raise_for_status()
    answer = problem(client.post("/studies", json={"options": ["a", "own"]}), 422)
    assert [error["field"] for error in answer["errors"]] == ["options.1"]
