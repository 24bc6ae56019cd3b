"""What the API's description cannot express, for schemathesis, which loads this module: how parts
of a request depend on each other, and what a data set looks like inside.

Only requests that should be valid are changed; requests that should be invalid stay invalid.
"""

import hashlib
import io
import os
from typing import Any

import numpy as np
import schemathesis
from schemathesis import Case, GenerationMode, HookContext, Response
from schemathesis.core.failures import Failure

#: Finished jobs, which no request may delete.
JOB_IDS = os.environ["CONTRACT_JOB_IDS"].split()
#: Their options, which no request can change.
OPTIONS = ("a", "b", "c")
#: Their data set, without which none of them could be resumed.
DATASET = os.environ["CONTRACT_DATASET"]
#: A finished study, which no request may delete.
STUDY_ID = os.environ["CONTRACT_STUDY_ID"]
#: A study of more seeds would only fill the queue.
MAX_ARMS, MAX_SEEDS = 3, 2


@schemathesis.hook
def before_call(context: HookContext, case: Case, kwargs: dict[str, Any]) -> None:
    if case.path_parameters.get("job_id") in JOB_IDS and case.method == "DELETE":
        case.path_parameters["job_id"] = "0" * 12
    if case.path_parameters.get("study_id") == STUDY_ID and case.method == "DELETE":
        case.path_parameters["study_id"] = "0" * 12
    if case.path_parameters.get("name") == DATASET and case.method == "DELETE":
        case.path_parameters["name"] = "nothing"
    if case.meta is None or case.meta.generation.mode is not GenerationMode.POSITIVE:
        return
    if case.path.startswith("/jobs/{job_id}") and case.method == "GET":
        case.path_parameters["job_id"] = JOB_IDS[len(str(case.query)) % len(JOB_IDS)]
    if case.path == "/options/{name}" and case.method == "GET":
        case.path_parameters["name"] = OPTIONS[len(str(case.query)) % len(OPTIONS)]
    if case.path.startswith("/studies/{study_id}") and case.method == "GET":
        case.path_parameters["study_id"] = STUDY_ID
    if case.path == "/studies" and isinstance(case.body, dict):
        make_study_possible(case.body)
    if case.path == "/studies/{study_id}/seeds" and isinstance(case.body, dict):
        case.body["num"] = 1
    if case.path.startswith("/comparisons"):
        name_jobs(case.query)
    if "min_accuracy" in case.query or "max_accuracy" in case.query:
        order_thresholds(case.query)
    for holder in (case.body, case.query):
        use_known_options(holder)
    if case.path == "/jobs" and isinstance(case.body, dict):
        use_known_dataset(case.body)
    if case.headers and case.headers.get("idempotency-key"):
        # Each key always has the same body, so that some requests are replays.
        key = hashlib.sha256(
            repr((case.path, case.path_parameters, case.body)).encode()
        ).hexdigest()
        case.headers["idempotency-key"] = key
    if case.path == "/datasets/{name}" and case.method == "PUT":
        case.body = make_npz()


@schemathesis.hook
def filter_failure(context: HookContext, failure: Failure, case: Case, response: Response) -> bool:
    """What is sent as an array or as a float may be on the wire a whole number, which is right; and
    a query may be wrong and too long, which is refused first."""
    last_event_id = case.headers.get("last-event-id")
    is_right = response.status_code == 431 or (last_event_id and is_whole(last_event_id))
    return not (failure.code == "ST201" and is_right)


def is_whole(text: str) -> bool:
    try:
        return float(text).is_integer()
    except ValueError:
        return False


def name_jobs(query: dict[str, Any]) -> None:
    """By id or by option, and not both."""
    query.pop("job_id" if query.get("options") else "options", None)
    if not query.get("options"):
        query["job_id"] = JOB_IDS


def order_thresholds(query: dict[str, Any]) -> None:
    given = sorted([float(query.get("min_accuracy", 0)), float(query.get("max_accuracy", 1))])
    query["min_accuracy"], query["max_accuracy"] = given


def use_known_options(holder: Any) -> None:
    """Those that nobody deletes."""
    if not isinstance(holder, dict):
        return
    for field in ("option", "base"):
        if isinstance(holder.get(field), str):
            holder[field] = OPTIONS[len(holder[field]) % len(OPTIONS)]
    if isinstance(holder.get("options"), str) and holder["options"]:
        holder["options"] = ", ".join(OPTIONS[: 1 + len(holder["options"]) % len(OPTIONS)])


def use_known_dataset(body: dict[str, Any]) -> None:
    if body.get("dataset", "arc") not in ("arc", "atomic"):
        body["dataset"] = "arc"


def make_study_possible(body: dict[str, Any]) -> None:
    """Few arms that differ, few seeds, and no fields that contradict each other."""
    body["options"] = [
        make_arm(option, number) for number, option in enumerate(body["options"][:MAX_ARMS])
    ]
    if body.get("grid"):
        body["grid"] = {"latent_dim": [4, 5]}
    if isinstance(body.get("config"), dict):
        use_known_dataset(body["config"])
        for key in ("seed", "class_weighting", "focal_gamma"):  # the options differ in the latter
            body["config"].pop(key, None)
    if thresholds := body.get("thresholds"):
        order_thresholds(thresholds)
    is_race = body.get("until_decided")
    if is_race or body.get("num_seeds"):
        body.pop("seeds", None)
    if body.get("seeds"):
        body["seeds"] = list(dict.fromkeys(body["seeds"]))[:MAX_SEEDS]
    body["num_seeds"] = None if body.get("seeds") else MAX_SEEDS
    body.pop("max_seeds", None)
    if is_race:
        body["max_seeds"] = MAX_SEEDS


def make_arm(arm: Any, number: int) -> Any:
    base = "abc"[number]
    if isinstance(arm, str):
        return base
    given = arm.get("config", {}).items()
    config = {key: value for key, value in given if key not in ("seed", "data_seed")}
    use_known_dataset(config)
    return arm | {"name": f"arm {number}", "base": base, "config": config | {"beta": 900 + number}}


def make_npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, images=np.zeros((10, 4, 4), dtype=np.uint8))
    return file.getvalue()
