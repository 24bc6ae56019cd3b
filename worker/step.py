"""One step of training and all that it changes, which stays on the device."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from server.models.configuration import NUM_COLOURS, TrainingConfig
from worker.atomic import GRID_SIZE
from worker.capture import StepInputs, capture, compiled
from worker.data import DeviceGrids
from worker.device import choose_dtype, make_deterministic, sharing_device
from worker.losses import compute_loss
from worker.metrics import BatchCounts, MetricSums, count_batch
from worker.model import BetaVAE, choose_weight_seed
from worker.optimizer import Adam
from worker.weights import FlatWeights

_Compute = Callable[..., tuple[Tensor, BatchCounts]]

_logger = logging.getLogger(__name__)


class StepPath(StrEnum):
    """How the steps of a run are launched; the numbers of two paths differ by rounding."""

    plain = "plain"  # one operation after the other
    graph = "graph"  # recorded once and replayed
    compiled = "compiled"  # the same with its operations joined by PyTorch's compiler


class TrainingStep:
    """A model, its optimizer, and one step of both at fixed addresses.

    Nothing in a step waits for the device, so that a GPU can replay it as a graph.
    """

    def __init__(
        self, config: TrainingConfig, grids: DeviceGrids, *, class_weights: Tensor
    ) -> None:
        device = class_weights.device
        self._config = config
        self._grids = grids
        self.batch_size = min(config.batch_size, grids.num_grids)
        # Whole batches only, so that every step has one shape; the remainder of an epoch's
        # shuffle is left out, a different one in each epoch.
        self.steps_per_epoch = grids.num_grids // self.batch_size
        make_deterministic()
        self.generator = torch.Generator(device=device)
        self.inputs = StepInputs(batch_size=self.batch_size, device=device)
        self.sums = MetricSums(latent_dim=config.latent_dim, device=device)
        self.losses = torch.zeros(self.steps_per_epoch, device=device)
        self._noise = torch.zeros(self.batch_size, config.latent_dim, device=device)
        with sharing_device, torch.random.fork_rng(devices=[]):
            torch.manual_seed(choose_weight_seed(config))
            model = BetaVAE(latent_dim=config.latent_dim, grid_size=grids.grid_size)
        self.model = model.to(device)
        self.weights = FlatWeights(self.model, dtype=choose_dtype(device))
        self.adam = Adam(self.weights.master)
        self.path = StepPath.plain
        self.objective: dict[str, Any] = {
            "class_weights": class_weights,
            "focal_gamma": config.focal_gamma if config.use_focal_loss else 0.0,
            "free_bits": config.free_bits,
        }
        self._compute: _Compute = partial(compute_batch, self.model, **self.objective)
        self._launch: Callable[[], None] = self._run

    def run(self, indices: Tensor, *, position: int, beta: float, learning_rate: float) -> None:
        """One step with the grids at `indices` (B,), the step at `position` of its epoch."""
        self.inputs.fill(indices, position=position, beta=beta)
        self.adam.set_learning_rate(learning_rate)
        self._launch()

    def begin_epoch(self, seed: int) -> Tensor:
        """Reset what is counted in an epoch; returns the order of its grids."""
        self.generator.manual_seed(seed)
        self.sums.reset()
        self.losses.zero_()
        return torch.randperm(
            self._grids.num_grids, generator=self.generator, device=self.losses.device
        )

    def _run(self) -> None:
        """Its mean loss goes to `losses`, NaN if it or a gradient is not finite."""
        grids = self._draw()
        self._noise.normal_(generator=self.generator)
        mean_loss, counts = self._compute(grids, self._noise, beta=self.inputs.beta)
        gradients = torch.autograd.grad(mean_loss, self.weights.parameters)
        loss = mean_loss.detach()
        is_finite = self.adam.step(
            self.weights.flatten(gradients), loss=loss, max_norm=self._config.max_grad_norm
        )
        self.weights.use_master()
        self.sums.add(counts)
        step_loss = torch.where(is_finite, loss, torch.nan)
        self.losses.index_copy_(0, self.inputs.position, step_loss.unsqueeze(0))

    def _draw(self) -> Tensor:
        indices = self.inputs.indices
        if not self._config.augment:
            return self._grids.draw(indices)
        symmetries = torch.randint(
            8, indices.shape, generator=self.generator, device=indices.device
        )
        return self._grids.draw(indices, symmetries=symmetries)

    def prepare(self, *, best: StepPath = StepPath.compiled) -> None:
        """On a GPU, take the quickest path up to `best` that works there, without a change to any
        number. What fails is logged with its reason."""
        if self.weights.master.device.type != "cuda" or best is StepPath.plain:
            return
        if best is StepPath.compiled:
            self.compile()
        replay = capture(
            self._run,
            name="training step",
            generator=self.generator,
            warming_up=self.unchanged(),
        )
        if replay is not None:
            self._launch = replay
            self.path = max(self.path, StepPath.graph, key=list(StepPath).index)

    def compile(self) -> None:
        """Let PyTorch's compiler join operations; it needs a C compiler."""
        plain = self._compute
        self._compute = partial(compiled(compute_batch), self.model, **self.constants())
        self.adam.is_compiled = True
        try:
            with sharing_device, self.unchanged():
                self._run()
            self.path = StepPath.compiled
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._compute, self.adam.is_compiled = plain, False
            reason = str(error).partition("\n")[0]
            _logger.warning("the training step is not compiled and runs slower: %s", reason)

    def constants(self) -> dict[str, Tensor]:
        """The objective in tensors: its numbers are no part of what is compiled, so that all
        options share that."""
        return {
            name: torch.as_tensor(value, device=self.losses.device)
            for name, value in self.objective.items()
        }

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Undo what steps in here do to the epoch. Weights and moments do not change: Adam skips
        them, as after a loss that is not finite."""
        sums, losses = self.sums.state_dict(), self.losses.clone()
        generator, is_finite = self.generator.get_state(), self.adam.is_finite.clone()
        self.adam.is_finite.zero_()
        try:
            yield
        finally:
            self.sums.load_state_dict(sums)
            self.losses.copy_(losses)
            self.generator.set_state(generator)
            self.adam.is_finite.copy_(is_finite)


def compute_batch(
    model: BetaVAE, grids: Tensor, noise: Tensor, *, beta: Tensor, **objective: Any
) -> tuple[Tensor, BatchCounts]:
    """The mean loss of a batch of `grids` (B, S, S), and what it adds to the metrics."""
    output = model(grids, noise=noise)
    loss = compute_loss(output, grids=grids, beta=beta, **objective)
    return loss.total.mean(), count_batch(loss, logits=output.logits, grids=grids)


def warm_up(device: torch.device) -> None:
    """Make a step ready as most jobs need it, so that the first one finds its libraries loaded and
    its kernels compiled."""
    config = TrainingConfig()
    grids = np.zeros((config.batch_size, GRID_SIZE, GRID_SIZE), dtype=np.uint8)
    class_weights = torch.ones(NUM_COLOURS, device=device)
    TrainingStep(config, DeviceGrids(grids, device=device), class_weights=class_weights).prepare()
