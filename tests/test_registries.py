"""What can be added with one function or class and one registration, and is known everywhere."""

import pytest
from test_criteria import make_epoch, make_job

from server.files.artifacts import FILE_NAMES
from server.judging.criteria import CRITERIA, CriterionName, CriterionStatus, Finding, criterion
from server.judging.verdicts import judge
from server.models.configuration import BuiltInDataset, resolve_config
from server.models.options import OPTIONS, Option
from server.models.tables import ArtifactKind
from worker.data import SOURCES
from worker.pictures import PICTURES

EPOCHS = [make_epoch(1), make_epoch(2)]


def test_every_option_has_a_preset_that_resolves() -> None:
    assert list(OPTIONS) == list(Option)
    for option in Option:
        config = resolve_config(option)
        assert config.model_dump().items() >= OPTIONS[option].config.items()


def test_every_built_in_data_set_has_a_source() -> None:
    assert SOURCES.keys() == set(BuiltInDataset)


def test_every_criterion_is_registered_in_the_order_of_its_name() -> None:
    assert list(CRITERIA) == list(CriterionName)


def test_registered_criterion_is_part_of_every_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(CRITERIA, CriterionName.completed)
    assert len(judge(make_job(), EPOCHS).criteria) == len(CriterionName) - 1

    @criterion(CriterionName.completed)
    def judge_nothing(_evidence: object) -> Finding:
        return Finding(target="never", has_passed=False)

    added = judge(make_job(), EPOCHS).criteria[-1]
    assert (added.name, added.status) == (CriterionName.completed, CriterionStatus.failed)
    monkeypatch.undo()


def test_every_picture_is_a_kind_of_artifact_with_a_name() -> None:
    assert PICTURES.keys() == set(ArtifactKind) - {ArtifactKind.checkpoint}
    assert FILE_NAMES.keys() == set(ArtifactKind)
