"""Adam against PyTorch's own, and the learning rate that it is given."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from server.models.configuration import TrainingConfig
from worker.optimizer import Adam, compute_learning_rate, update_without_asking

LEARNING_RATE = 0.01


def make_weights() -> Tensor:
    return torch.randn(1000, generator=torch.Generator().manual_seed(0))


def draw_gradients(*, num: int = 20) -> list[Tensor]:
    """Some are longer than the norm to which they are clipped."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1000, generator=generator) * 0.02 * (1 + i % 3) for i in range(num)]


def make_adam() -> Adam:
    adam = Adam(make_weights())
    adam.set_learning_rate(LEARNING_RATE)
    return adam


def test_steps_are_those_of_pytorch() -> None:
    adam, theirs = make_adam(), nn.Parameter(make_weights())
    optimizer = torch.optim.Adam([theirs], lr=LEARNING_RATE)
    for gradient in draw_gradients():
        theirs.grad = gradient.clone()
        nn.utils.clip_grad_norm_([theirs], 1.0)
        optimizer.step()
        assert adam.step(gradient, loss=torch.tensor(1.0), max_norm=1.0)
    assert torch.allclose(adam.weights, theirs.detach(), rtol=1e-5, atol=1e-7)
    state = optimizer.state[theirs]
    assert adam.num_steps == state["step"]
    assert torch.allclose(adam.exp_avg, state["exp_avg"], rtol=1e-5, atol=1e-9)
    assert torch.allclose(adam.exp_avg_sq, state["exp_avg_sq"], rtol=1e-5, atol=1e-12)


def test_steps_that_a_gpu_makes_are_those_of_pytorch() -> None:
    adam, theirs = make_adam(), nn.Parameter(make_weights())
    optimizer = torch.optim.Adam([theirs], lr=LEARNING_RATE)
    for number, gradient in enumerate(draw_gradients()):
        theirs.grad = gradient.clone()
        optimizer.step()
        for share in (0.0, 1.0):  # nothing changes where none of the step is made
            update_without_asking(
                adam.weights,
                adam.exp_avg,
                adam.exp_avg_sq,
                gradient * share,
                num_steps=torch.tensor(number + 1.0),
                learning_rate=adam.learning_rate,
                share=torch.tensor(share),
            )
    assert torch.allclose(adam.weights, theirs.detach(), rtol=1e-4, atol=1e-6)
    state = optimizer.state[theirs]
    assert torch.allclose(adam.exp_avg, state["exp_avg"], rtol=1e-5, atol=1e-9)
    assert torch.allclose(adam.exp_avg_sq, state["exp_avg_sq"], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("num_before", [0, 3])
@pytest.mark.parametrize(
    ("loss", "gradient"), [(1.0, torch.nan), (1.0, torch.inf), (torch.nan, 1.0), (torch.inf, 1.0)]
)
def test_weights_and_moments_stay_from_a_value_that_is_not_finite_on(
    num_before: int, loss: float, gradient: float
) -> None:
    adam = make_adam()
    for each in draw_gradients(num=num_before):
        adam.step(each, loss=torch.tensor(1.0), max_norm=1.0)
    state = adam.weights, adam.exp_avg, adam.exp_avg_sq, adam.num_steps
    before = [tensor.clone() for tensor in state]
    bad = torch.ones(1000)
    bad[7] = gradient
    assert not adam.step(bad, loss=torch.tensor(loss), max_norm=1.0)
    for each in draw_gradients():
        adam.step(each, loss=torch.tensor(1.0), max_norm=1.0)
    assert all(map(torch.equal, state, before))


def test_training_does_without_the_compiler_which_is_slow_to_import() -> None:
    script = """
import sys, torch
from worker.data import Dataset
from worker.training import Trainer
from server.models.configuration import TrainingConfig
import numpy as np
grids = np.zeros((8, 4, 4), dtype=np.uint8)
config = TrainingConfig(epochs=1, batch_size=4)
list(Trainer(config, Dataset(grids, grids, grids), device=torch.device("cpu")).epochs())
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_learning_rate_below_where_the_decay_ends_stays_as_it_is() -> None:
    config = TrainingConfig(learning_rate=1e-6, min_learning_rate=1e-5)
    assert {compute_learning_rate(config, step=step, num_steps=5) for step in range(5)} == {1e-6}


def test_learning_rate_falls_on_a_cosine_from_start_to_end() -> None:
    config = TrainingConfig(learning_rate=1e-3, min_learning_rate=1e-5)
    rates = [compute_learning_rate(config, step=step, num_steps=101) for step in (0, 50, 100)]
    assert rates == pytest.approx([1e-3, (1e-3 + 1e-5) / 2, 1e-5])
