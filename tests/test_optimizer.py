"""Adam against PyTorch's own, and the learning rate that it is given."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from server.models.configuration import TrainingConfig
from worker.optimizer import Adam, compute_learning_rate

LEARNING_RATE = 0.01


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    for step in range(5):
        model.zero_grad()
        model(torch.full((3, 4), float(step))).sum().backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def test_steps_are_those_of_pytorch() -> None:
    ours, theirs = make_model(), make_model()
    adam = Adam(ours.parameters(), learning_rate=LEARNING_RATE, device=torch.device("cpu"))
    expected = train(theirs, torch.optim.Adam(theirs.parameters(), lr=LEARNING_RATE, fused=True))
    assert all(map(torch.equal, train(ours, adam), expected))


def test_weights_stay_while_a_gradient_is_not_finite() -> None:
    model = make_model()
    adam = Adam(model.parameters(), learning_rate=LEARNING_RATE, device=torch.device("cpu"))
    adam.found_inf.fill_(1.0)
    assert all(map(torch.equal, train(model, adam), make_model().parameters()))


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
