"""What can be added with one function or class and one registration, and is known everywhere."""

import pytest
from conftest import BOTH_DATABASES
from sqlalchemy import Engine, text
from test_criteria import make_epoch, make_job

from server.files.artifacts import FILE_NAMES
from server.judging.criteria import (
    CRITERIA,
    CriterionName,
    CriterionStatus,
    Diagnosis,
    Finding,
    criterion,
)
from server.judging.verdicts import judge
from server.models.columns import utc_now
from server.models.configuration import BuiltInDataset, resolve_config
from server.models.options import OPTIONS, BuiltInOption
from server.models.tables import ArtifactKind
from worker.data import SOURCES
from worker.pictures import PICTURES

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


def test_every_criterion_is_registered_in_the_order_of_its_name() -> None:
    assert list(CRITERIA) == list(CriterionName)


def test_registered_criterion_is_part_of_every_verdict_and_names_its_diagnosis(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(CRITERIA, CriterionName.completed)
    assert len(judge(make_job(), EPOCHS).criteria) == len(CriterionName) - 1

    @criterion(CriterionName.completed)
    def judge_nothing(_evidence: object) -> Finding:
        return Finding(target="never", has_passed=False, diagnosis=Diagnosis.out_of_range)

    verdict = judge(make_job(), EPOCHS)
    added = verdict.criteria[-1]
    assert (added.name, added.status) == (CriterionName.completed, CriterionStatus.failed)
    assert verdict.diagnosis is Diagnosis.out_of_range
    monkeypatch.undo()


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
