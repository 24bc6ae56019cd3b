"""What can be added with one function or class and one registration, and is known everywhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from artificial_runs import make_epoch, make_job
from conftest import BOTH_DATABASES
from sqlalchemy import Engine, text

from server.dashboard.drawings import SEED_MARKS
from server.files.artifacts import FILE_NAMES
from server.judging.criteria import (
    CRITERIA,
    CriteriaSet,
    CriterionName,
    CriterionStatus,
    Diagnosis,
    Finding,
    criterion,
    list_criteria,
)
from server.judging.groups import GROUP_METRICS, RANKING_METRICS, GroupMetric
from server.judging.verdicts import judge
from server.models.columns import utc_now
from server.models.configuration import BuiltInDataset, resolve_config
from server.models.options import OPTIONS, BuiltInOption
from server.models.tables import ArtifactKind
from worker.data import SOURCES
from worker.pictures import PICTURES

ROOT = Path(__file__).parent.parent
EPOCHS = [make_epoch(1), make_epoch(2)]
INSERT_JOB = """
    INSERT INTO job (id, option, quick_test, is_pinned, metadata, priority, config, status,
                     progress, attempt, num_requeues, num_lost_attempts, claimed_progress,
                     created_at, epochs_completed)
    VALUES ('0123456789ab', :option, false, false, '{}', 0, '{}', 'queued', 0, 0, 0, 0, 0, :now, 0)
"""
INSERT_ARTIFACT = """
    INSERT INTO artifact (job_id, kind, epoch, file_name, size_bytes, sha256, created_at)
    VALUES ('0123456789ab', :kind, 1, 'file', 1, '', :now)
"""


def test_every_option_has_a_preset_that_resolves() -> None:
    assert list(OPTIONS) == list(BuiltInOption)
    for option in BuiltInOption:
        config = resolve_config(OPTIONS[option].config)
        assert config.model_dump().items() >= OPTIONS[option].config.items()


def test_every_built_in_data_set_has_a_source() -> None:
    assert SOURCES.keys() == set(BuiltInDataset)


def test_every_criterion_is_registered_in_a_set() -> None:
    assert CRITERIA.keys() == set(CriterionName)
    assert all(registered.sets for registered in CRITERIA.values())


def test_sets_have_the_criteria_that_they_should_in_their_order() -> None:
    training = ["loss_decreases", "stable", "completed"]
    asked_for = ["accuracy_in_range", "not_mode_collapsed", "kl_per_dimension"]
    known = ["informative", "separates_foreground", "knows_colours", "paints_truthfully"]
    assert list_criteria(CriteriaSet.spec) == asked_for + training
    assert list_criteria(CriteriaSet.evidence) == [*known, "generalises", *training]


def test_criteria_are_registered_for_whoever_judges() -> None:
    """Also in a process that imports nothing else."""
    check = "from server.judging.verdicts import judge; from server.judging.criteria import *; "
    check += "import sys; sys.exit(len(CRITERIA) != len(CriterionName))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_registered_criterion_is_part_of_every_verdict_and_names_its_diagnosis(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(CRITERIA, CriterionName.completed)
    assert CriterionName.completed not in list_criteria(CriteriaSet.spec)

    @criterion(CriterionName.completed, CriteriaSet.spec)
    def judge_nothing(_evidence: object) -> Finding:
        return Finding(target="never", has_passed=False, diagnosis=Diagnosis.out_of_range)

    verdict = judge(make_job(), EPOCHS)
    added = verdict.criteria[-1]
    assert (added.name, added.status) == (CriterionName.completed, CriterionStatus.failed)
    assert verdict.diagnosis is Diagnosis.out_of_range
    others = judge(make_job(), EPOCHS, criteria_set=CriteriaSet.evidence).criteria
    assert CriterionName.completed not in [each.name for each in others]
    monkeypatch.undo()


def test_every_group_has_a_metric_for_its_ranking() -> None:
    assert GROUP_METRICS.keys() == set(GroupMetric)
    assert RANKING_METRICS.keys() == set(CriteriaSet)


@pytest.mark.parametrize("diagnosis", Diagnosis)
def test_every_diagnosis_has_a_mark_with_a_colour(diagnosis: Diagnosis) -> None:
    styles = (ROOT / "server/dashboard/static/studies.css").read_text()
    assert diagnosis in SEED_MARKS
    assert re.search(rf"\.seed-{diagnosis}[ ,][^}}]*{{ color: var\(", styles)


def test_marks_of_seeds_differ_in_their_shape() -> None:
    assert len(set(SEED_MARKS.values())) == len(SEED_MARKS)


@BOTH_DATABASES
def test_database_keeps_options_and_kinds_of_files_that_came_later(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text(INSERT_JOB), {"option": "later", "now": utc_now()})
        connection.execute(text(INSERT_ARTIFACT), {"kind": "later", "now": utc_now()})
        assert connection.execute(text("SELECT option FROM job")).scalar_one() == "later"
        assert connection.execute(text("SELECT kind FROM artifact")).scalar_one() == "later"


def test_every_picture_is_a_kind_of_artifact_with_a_name() -> None:
    assert PICTURES.keys() == set(ArtifactKind) - {ArtifactKind.checkpoint}
    assert FILE_NAMES.keys() == set(ArtifactKind)
