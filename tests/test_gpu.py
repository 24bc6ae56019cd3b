"""What only a GPU can show: compiled and captured steps, and several jobs at the same time."""

import logging
import threading
from dataclasses import asdict

import pytest
import torch

from server.models.configuration import TrainingConfig
from worker.atomic import generate_atomic
from worker.data import Dataset
from worker.device import own_stream
from worker.step import StepPath
from worker.training import EpochResult, Trainer, TrainingStopped

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: what it computes is not tested here"
)

NUM_JOBS, NUM_EPOCHS = 8, 3
Numbers = list[dict[str, object]]


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    grids = generate_atomic(num_grids=4_000, seed=0)
    return Dataset(grids[:3_200], grids[3_200:3_600], grids[3_600:])


def make_trainer(dataset: Dataset, *, seed: int = 0, stop_after: int | None = None) -> Trainer:
    num_done = 0

    def on_step(_trainer: Trainer) -> None:
        nonlocal num_done
        num_done += 1

    return Trainer(
        TrainingConfig(epochs=NUM_EPOCHS, seed=seed, data_seed=0),
        dataset,
        device=torch.device("cuda"),
        should_stop=lambda: stop_after is not None and num_done >= stop_after,
        on_step=on_step,
    )


def describe(result: EpochResult) -> dict[str, object]:
    measured = asdict(result)
    del measured["seconds"], measured["grids_per_second"]
    return measured


def train(dataset: Dataset, *, seed: int = 0) -> Numbers:
    return [describe(result) for result in make_trainer(dataset, seed=seed).epochs()]


def test_jobs_at_the_same_time_have_the_numbers_of_each_alone(dataset: Dataset) -> None:
    alone = [train(dataset, seed=seed) for seed in range(NUM_JOBS)]
    found: dict[int, Numbers] = {}

    def run(seed: int) -> None:
        with own_stream():
            found[seed] = train(dataset, seed=seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(NUM_JOBS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found.get(seed) for seed in range(NUM_JOBS)] == alone


def test_steps_are_compiled_and_have_the_losses_of_plain_ones(dataset: Dataset) -> None:
    losses = {}
    for path in (StepPath.plain, StepPath.graph, StepPath.compiled):
        trainer = make_trainer(dataset)
        trainer._path_before = path
        assert trainer.prepare()
        losses[path] = [result.train.loss for result in trainer.epochs()]
    assert losses[StepPath.graph] == pytest.approx(losses[StepPath.plain], rel=0.01)
    assert losses[StepPath.compiled] == pytest.approx(losses[StepPath.plain], rel=0.01)


@pytest.mark.parametrize("path", [StepPath.graph, StepPath.compiled])
def test_resumed_run_takes_the_path_that_it_began_with(dataset: Dataset, path: StepPath) -> None:
    whole = make_trainer(dataset)
    whole._path_before = path
    expected = [describe(result) for result in whole.epochs()]
    stopped = make_trainer(dataset, stop_after=37)
    stopped._path_before = path
    with pytest.raises(TrainingStopped):
        list(stopped.epochs())
    state = stopped.copy_state()
    assert (state.path, state.epoch, state.step) == (path, 1, 12)
    resumed = make_trainer(dataset)
    assert resumed.load_state(state)
    assert resumed.prepare()
    assert [describe(result) for result in resumed.epochs()] == expected[1:]


def test_step_that_cannot_be_compiled_is_captured(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def find_no_compiler(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr("worker.step.compiled", lambda _compute: find_no_compiler)
    trainer = make_trainer(dataset)
    with caplog.at_level(logging.WARNING, logger="worker"):
        trainer.prepare()
    assert trainer.path is StepPath.graph
    assert "Failed to find C compiler" in caplog.text
    assert len(list(trainer.epochs())) == NUM_EPOCHS
