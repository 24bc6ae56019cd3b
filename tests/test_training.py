"""The training loop, on tiny data."""

import inspect
import pathlib
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import worker
from server.models.configuration import TrainingConfig
from worker.atomic import generate_atomic
from worker.data import Dataset
from worker.model import BetaVAE, choose_weight_seed
from worker.training import (
    EpochResult,
    NonFiniteLossError,
    Trainer,
    TrainingState,
    TrainingStopped,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    grids = generate_atomic(num_grids=400, seed=0)
    return Dataset(grids[:320], grids[320:360], grids[360:])


@pytest.fixture(scope="module")
def whole(dataset: Dataset) -> list[EpochResult]:
    """Three epochs that nothing interrupts."""
    return list(make_trainer(dataset).epochs())


@pytest.fixture(scope="module")
def base(dataset: Dataset) -> list[tuple[float, ...]]:
    """The curve of two epochs with nothing but the defaults."""
    return curve(list(make_trainer(dataset, epochs=2).epochs()))


def make_trainer(dataset: Dataset, **overrides: object) -> Trainer:
    config = TrainingConfig.model_validate({"epochs": 3, "batch_size": 32} | overrides)
    return Trainer(config, dataset, device=CPU)


def curve(results: list[EpochResult]) -> list[tuple[float, ...]]:
    return [(r.train.loss, r.val.recon_loss, *r.val.kl_per_dimension) for r in results]


def test_model_has_about_800_000_parameters() -> None:
    assert sum(p.numel() for p in BetaVAE(latent_dim=10).parameters()) == 792_542


@pytest.mark.parametrize("size", [4, 8, 16, 32])
def test_model_takes_grids_of_any_size_divisible_by_4(size: int) -> None:
    output = BetaVAE(latent_dim=3, grid_size=size)(torch.zeros(2, size, size, dtype=torch.uint8))
    assert output.logits.shape == (2, 10, size, size)
    assert output.mu.shape == output.logvar.shape == (2, 3)


def test_model_clamps_mu_and_logvar() -> None:
    model = BetaVAE(latent_dim=2)
    with torch.no_grad():
        model.to_mu.bias.fill_(100.0)
        model.to_logvar.bias.fill_(100.0)
    mu, logvar = model.encode(torch.zeros(1, 16, 16, dtype=torch.uint8))
    assert mu.max() == 5.0
    assert logvar.max() == 2.0
    with torch.no_grad():
        model.to_mu.bias.fill_(-100.0)
        model.to_logvar.bias.fill_(-100.0)
    mu, logvar = model.encode(torch.zeros(1, 16, 16, dtype=torch.uint8))
    assert mu.min() == -5.0
    assert logvar.min() == -20.0


def test_trainer_yields_one_result_an_epoch_and_learns(dataset: Dataset) -> None:
    results = list(make_trainer(dataset, epochs=8).epochs())
    assert [result.epoch for result in results] == list(range(1, 9))
    assert results[-1].train.recon_loss < results[0].train.recon_loss / 2
    assert results[-1].beta == 1.0
    assert results[-1].learning_rate == pytest.approx(1e-5)
    assert len(results[-1].val.kl_per_dimension) == 10


def test_the_same_seed_gives_the_same_curve_and_another_seed_another(
    dataset: Dataset, whole: list[EpochResult]
) -> None:
    first = curve(whole)
    assert first == curve(list(make_trainer(dataset).epochs()))
    assert first != curve(list(make_trainer(dataset, seed=1).epochs()))


@pytest.mark.parametrize("num_steps", [1, 7, 10, 13, 29])
def test_a_run_resumed_after_any_step_is_the_uninterrupted_one_to_the_last_bit(
    dataset: Dataset, whole: list[EpochResult], num_steps: int
) -> None:
    state = run_steps(dataset, num_steps)
    resumed = make_trainer(dataset)
    resumed.load_state(state)
    results = list(resumed.epochs())
    assert [numbers(r) for r in results] == [numbers(r) for r in whole[state.epoch :]]


def test_a_state_of_another_kind_of_device_goes_on_and_says_so(dataset: Dataset) -> None:
    state = run_steps(dataset, 13)
    assert make_trainer(dataset).load_state(state)
    # A GPU's generator has 16 bytes, a CPU's some thousands.
    state.tensors["generator"] = torch.zeros(16, dtype=torch.uint8)
    resumed = make_trainer(dataset)
    assert not resumed.load_state(state)
    assert [result.epoch for result in resumed.epochs()] == [2, 3]


class CountWaits(TorchDispatchMode):
    """Counts how often the host waits for a value from the device, as `.item()` does."""

    def __init__(self) -> None:
        super().__init__()
        self.num_waits = 0

    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ):
        self.num_waits += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_host_never_waits_for_the_device_inside_an_epoch(dataset: Dataset) -> None:
    waits = []
    for batch_size in (32, 64):
        trainer = make_trainer(dataset, batch_size=batch_size)
        with CountWaits() as counter:
            next(trainer.epochs())
        waits.append(counter.num_waits)
    # Twice as many steps ask no more often: all of it is after the last one.
    assert waits[0] == waits[1]


def run_steps(dataset: Dataset, num_steps: int) -> TrainingState:
    """The state of a run that was stopped after so many of its steps, 10 an epoch."""
    num_done = 0

    def on_step(_trainer: Trainer) -> None:
        nonlocal num_done
        num_done += 1

    config = TrainingConfig(epochs=3, batch_size=32)
    trainer = Trainer(
        config,
        dataset,
        device=CPU,
        should_stop=lambda: num_done >= num_steps,
        on_step=on_step,
    )
    with pytest.raises(TrainingStopped):
        list(trainer.epochs())
    state = trainer.copy_state()
    # After the tenth step the epoch's validation is still to come.
    assert state.epoch * 10 + state.step == num_steps
    return state


def numbers(result: EpochResult) -> dict[str, object]:
    measured = asdict(result)
    del measured["seconds"], measured["grids_per_second"]
    return measured


def test_a_non_finite_loss_stops_before_the_weights_move(dataset: Dataset) -> None:
    trainer = make_trainer(dataset, beta_schedule="constant")
    before = trainer.copy_state().tensors
    trainer.class_weights[0] = torch.nan
    with pytest.raises(NonFiniteLossError, match="epoch 1, step 1"):
        next(trainer.epochs())
    after = trainer.copy_state().tensors
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_validation_loss_that_is_not_finite_fails_the_epoch(dataset: Dataset) -> None:
    trainer = make_trainer(dataset)

    def spoil_the_weights(trainer: Trainer) -> None:
        if trainer._under_way is not None and trainer._under_way.step == trainer.steps_per_epoch:
            with torch.no_grad():
                trainer.model.to_mu.weight.fill_(torch.nan)

    trainer._on_step = spoil_the_weights
    with pytest.raises(NonFiniteLossError, match="epoch 1, step 10"):
        next(trainer.epochs())


def test_training_stops_at_the_next_step_when_asked(dataset: Dataset) -> None:
    num_steps = 0

    def should_stop() -> bool:
        nonlocal num_steps
        num_steps += 1
        return num_steps > 3

    trainer = Trainer(TrainingConfig(batch_size=32), dataset, device=CPU, should_stop=should_stop)
    with pytest.raises(TrainingStopped):
        next(trainer.epochs())
    assert num_steps == 4


def test_fewer_grids_than_a_batch_are_one_batch(dataset: Dataset) -> None:
    trainer = make_trainer(dataset, batch_size=4096, epochs=1)
    assert trainer.steps_per_epoch == 1
    (result,) = trainer.epochs()
    assert result.max_spike_ratio is None


def test_evaluation_is_deterministic(dataset: Dataset) -> None:
    trainer = make_trainer(dataset)
    first = trainer.evaluate(trainer._val_grids, beta=1.0)
    assert trainer.evaluate(trainer._val_grids, beta=1.0) == first


@pytest.mark.parametrize(
    "override",
    [
        {"augment": False},
        {"batch_size": 16},
        {"learning_rate": 1e-2},
        {"min_learning_rate": 5e-4},
        {"max_grad_norm": 1e-3},
        {"latent_dim": 3},
        {"beta": 4.0},
        {"beta_schedule": "constant"},
        {"beta_schedule": "cyclical"},
        {"beta_warmup_fraction": 0.0},
        {"free_bits": 0.5},
        {"use_focal_loss": False},
        {"focal_gamma": 0.5},
        {"class_weighting": "sqrt_inverse"},
        {"class_weighting": "effective_number"},
        {"generator": 1},
        {"seed": 1},
    ],
    ids=str,
)
def test_every_training_setting_changes_the_curve(
    dataset: Dataset, base: list[tuple[float, ...]], override: dict[str, object]
) -> None:
    assert curve(list(make_trainer(dataset, epochs=2, **override).epochs())) != base


def test_beta_of_effective_number_changes_the_curve(dataset: Dataset) -> None:
    curves = [
        curve(
            list(
                make_trainer(
                    dataset,
                    epochs=1,
                    class_weighting="effective_number",
                    effective_number_beta=beta,
                ).epochs()
            )
        )
        for beta in (0.99, 0.9999)
    ]
    assert curves[0] != curves[1]


def draw(seed: int) -> torch.Tensor:
    return torch.rand(1000, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", [0, 1, 42, 2**31 - 1])
def test_initial_weights_have_random_numbers_of_their_own(dataset: Dataset, seed: int) -> None:
    weights = draw(choose_weight_seed(TrainingConfig(seed=seed)))
    assert not torch.equal(weights, draw(choose_weight_seed(TrainingConfig(seed=seed // 2 + 3))))
    trainer = make_trainer(dataset, seed=seed)
    for epoch in range(50):
        trainer.epoch = epoch
        trainer._begin_epoch()
        assert not torch.equal(weights, draw(trainer._step.generator.initial_seed()))


def test_weights_of_generator_1_are_those_of_the_seed_itself(dataset: Dataset) -> None:
    trainer = make_trainer(dataset, seed=7, generator=1)
    torch.manual_seed(7)
    expected = BetaVAE(latent_dim=10).state_dict()
    made = trainer.copy_state().tensors
    assert all(torch.equal(made[f"model.{name}"], expected[name]) for name in expected)
    others = make_trainer(dataset, seed=7).copy_state().tensors
    assert not torch.equal(others["model.to_mu.weight"], expected["to_mu.weight"])


@pytest.mark.parametrize("generator", [1, 2])
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (7, 2)])
def test_draws_of_an_epoch_are_those_of_older_versions(
    dataset: Dataset, generator: int, seed: int, epoch: int
) -> None:
    """A job that an older version has begun goes on as it would have there."""
    trainer = make_trainer(dataset, seed=seed, generator=generator)
    trainer.epoch = epoch
    expected = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(320, generator=expected)
    assert torch.equal(trainer._begin_epoch().order, order)
    assert torch.equal(trainer._step.generator.get_state(), expected.get_state())


def test_every_field_of_the_configuration_is_read_by_the_worker() -> None:
    folder = pathlib.Path(inspect.getfile(worker)).parent
    source = "\n".join(path.read_text() for path in folder.glob("*.py"))
    unread = [name for name in TrainingConfig.model_fields if f"config.{name}" not in source]
    assert unread == []


def test_batches_are_whole_so_that_every_step_has_one_shape(dataset: Dataset) -> None:
    trainer = make_trainer(dataset, batch_size=100)
    assert trainer.steps_per_epoch == 3
    result = next(trainer.epochs())
    assert result.grids_per_second > 0
    assert np.isfinite(result.train.loss)
