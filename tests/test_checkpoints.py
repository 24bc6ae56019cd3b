"""Checkpoint files: what they hold, and that equal states are equal files."""

import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
import torch
from conftest import SubmitJob, drain, read_artifacts
from safetensors.torch import load_file, save_file
from sqlalchemy import Engine

from server.models.configuration import EARLIER_VALUES, TrainingConfig
from server.settings import Settings
from worker.checkpoints import load_checkpoint
from worker.step import StepPath

SAVE: Final = """
import sys
from pathlib import Path

import torch

from server.models.configuration import TrainingConfig
from worker.checkpoints import save_checkpoint
from worker.training import TrainingState

tensors = {name: torch.arange(12.0).view(3, 4) for name in ("b", "é", "a")}
tensors["step"] = torch.tensor(7)
state = TrainingState(tensors, epoch=1, step=2)
save_checkpoint(Path(sys.argv[1]), state, config=TrainingConfig())
"""


def test_equal_states_are_equal_files_in_every_process(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for path in paths:
        subprocess.run([sys.executable, "-c", SAVE, path], check=True)
    assert len({path.read_bytes() for path in paths}) == 1
    state, config = load_checkpoint(paths[0])
    assert (state.epoch, state.step, config) == (1, 2, TrainingConfig())
    assert state.tensors.keys() == {"b", "é", "a", "step"}
    assert torch.equal(state.tensors["é"], torch.arange(12.0).view(3, 4))
    assert load_file(paths[0]).keys() == state.tensors.keys()


def test_same_job_twice_has_the_same_checkpoint(
    settings: Settings, engine: Engine, submit_job: SubmitJob
) -> None:
    jobs = [submit_job(epochs=1) for _ in range(2)]
    drain(settings, engine)
    hashes = {
        artifact.sha256
        for job in jobs
        for artifact in read_artifacts(engine, job)
        if artifact.kind == "checkpoint"
    }
    assert len(hashes) == 1


def test_checkpoint_of_an_older_version_is_loaded_with_the_settings_of_then(tmp_path: Path) -> None:
    path = tmp_path / "old.safetensors"
    old = TrainingConfig(seed=7).model_dump_json(exclude={"data_seed", *EARLIER_VALUES})
    metadata = {"format": "losslab-1", "step": "0", "config": old, "epoch": "3"}
    save_file({"model.a": torch.ones(2)}, path, metadata=metadata)
    state, config = load_checkpoint(path)
    assert (state.epoch, config.seed, config.generator) == (3, 7, 1)
    assert torch.equal(state.tensors["model.a"], torch.ones(2))


@pytest.mark.parametrize(
    ("stored", "path"), [({}, None), ({"step_path": "graph"}, StepPath.graph),
                         ({"step_path": "of a later version"}, None)],
)  # fmt: skip
def test_checkpoint_says_how_its_steps_were_launched_if_this_version_knows_it(
    tmp_path: Path, stored: dict[str, str], path: StepPath | None
) -> None:
    config = TrainingConfig().model_dump_json()
    metadata = {"config": config, "epoch": "1", "step": "0", "format": "losslab-1"}
    save_file({"x": torch.zeros(1)}, tmp_path / "c.safetensors", metadata=metadata | stored)
    assert load_checkpoint(tmp_path / "c.safetensors")[0].path == path
