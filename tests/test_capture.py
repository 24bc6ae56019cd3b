"""Steps as CUDA graphs. Without a GPU, everything except the recording itself really runs."""

import logging
from dataclasses import asdict

import numpy as np
import pytest
import torch

from server.models.configuration import TrainingConfig
from worker.atomic import generate_atomic
from worker.capture import StepInputs, capture
from worker.data import Dataset
from worker.step import StepPath
from worker.training import EpochResult, Trainer, TrainingStopped

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: graphs themselves are not tested here"
)
needs_no_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a CUDA device the recording would not fail"
)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    grids = generate_atomic(num_grids=400, seed=0)
    return Dataset(grids[:320], grids[320:360], grids[360:])


def make_trainer(dataset: Dataset, device: torch.device, *, stop_after: int = 10**9) -> Trainer:
    num_done = 0

    def on_step(_trainer: Trainer) -> None:
        nonlocal num_done
        num_done += 1

    return Trainer(
        TrainingConfig(epochs=3, batch_size=32),
        dataset,
        device=device,
        should_stop=lambda: num_done >= stop_after,
        on_step=on_step,
    )


def numbers(result: EpochResult) -> dict[str, object]:
    measured = asdict(result)
    del measured["seconds"], measured["grids_per_second"]
    return measured


def test_inputs_keep_their_addresses() -> None:
    inputs = StepInputs(batch_size=4, device=CPU)
    addresses = [t.data_ptr() for t in (inputs.indices, inputs.position, inputs.beta)]
    inputs.fill(torch.tensor([3, 1, 2, 0]), position=7, beta=0.25)
    assert inputs.indices.tolist() == [3, 1, 2, 0]
    assert inputs.position.tolist() == [7]
    assert inputs.beta.item() == 0.25
    assert addresses == [t.data_ptr() for t in (inputs.indices, inputs.position, inputs.beta)]


@needs_no_gpu
def test_what_cannot_be_recorded_runs_as_it_is_and_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls = []

    def work() -> None:
        calls.append(1)

    with caplog.at_level(logging.WARNING, logger="worker"):
        replay = capture(work, name="training step", generator=torch.Generator())
    assert replay is None
    assert calls == [1]
    (message,) = caplog.messages
    assert message.startswith("the training step is not captured as a graph and runs slower: ")
    assert not message.endswith(": ")


@needs_no_gpu
def test_the_warm_up_and_a_failed_recording_leave_no_trace_in_the_numbers(
    dataset: Dataset,
) -> None:
    plain = list(make_trainer(dataset, CPU).epochs())
    trainer = make_trainer(dataset, CPU)
    step = trainer._step
    capture(step._run, name="step", generator=step.generator, warming_up=step.unchanged())
    assert [numbers(r) for r in trainer.epochs()] == [numbers(r) for r in plain]


def test_the_warm_up_changes_neither_weights_nor_moments(dataset: Dataset) -> None:
    stopped = make_trainer(dataset, CPU, stop_after=4)
    with pytest.raises(TrainingStopped):
        next(stopped.epochs())
    before = stopped.copy_state().tensors
    with stopped._step.unchanged():
        for _ in range(3):
            stopped._step._run()
    after = stopped.copy_state().tensors
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def test_the_validation_that_is_captured_is_the_evaluation(dataset: Dataset) -> None:
    trainer = make_trainer(dataset, CPU)
    expected = trainer.evaluate(trainer._val_grids, beta=0.5)
    trainer._val_beta.fill_(0.5)
    for _ in range(2):
        trainer._sum_validation()
        assert trainer._val_sums.compute() == expected


@needs_gpu
def test_captured_steps_give_the_numbers_of_plain_ones(
    dataset: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    cuda = torch.device("cuda")
    captured = list(make_trainer(dataset, cuda).epochs())
    assert not caplog.messages
    trainer = make_trainer(dataset, cuda)
    trainer._path_before = StepPath.plain
    plain = list(trainer.epochs())
    for one, other in zip(captured, plain, strict=True):
        assert np.isclose(one.train.loss, other.train.loss, rtol=0.01)
        assert np.isclose(one.val.recon_loss, other.val.recon_loss, rtol=0.01)


@needs_gpu
@pytest.mark.parametrize("num_steps", [1, 10, 13])
def test_a_captured_run_resumed_is_the_uninterrupted_one(dataset: Dataset, num_steps: int) -> None:
    cuda = torch.device("cuda")
    whole = list(make_trainer(dataset, cuda).epochs())
    stopped = make_trainer(dataset, cuda, stop_after=num_steps)
    with pytest.raises(TrainingStopped):
        list(stopped.epochs())
    state = stopped.copy_state()
    resumed = make_trainer(dataset, cuda)
    resumed.load_state(state)
    assert [numbers(r) for r in resumed.epochs()] == [numbers(r) for r in whole[state.epoch :]]


@needs_gpu
def test_work_that_asks_the_device_is_not_recorded_and_what_follows_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    counter = torch.zeros(1, device="cuda")

    def count() -> None:
        counter.add_(1)

    def ask() -> None:
        counter.item()

    with caplog.at_level(logging.WARNING, logger="worker"):
        assert capture(ask, name="training step", generator=torch.Generator("cuda")) is None
        replay = capture(count, name="training step", generator=torch.Generator("cuda"))
    assert replay is not None
    (message,) = caplog.messages
    assert "captur" in message.partition("slower: ")[2]
    before = counter.item()
    replay()
    assert counter.item() == before + 1
