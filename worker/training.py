"""The training loop. A `Trainer` yields one `EpochResult` per epoch; it uses neither the database
nor files."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from server.errors import LosslabError
from server.models.configuration import TrainingConfig
from worker.capture import StepInputs, capture
from worker.data import Dataset, DeviceGrids
from worker.device import autocast, make_deterministic, sharing_device
from worker.evaluation import EvaluationMetrics, EvaluationSums, compute_log_prior
from worker.losses import (
    GridLoss,
    compute_beta,
    compute_class_weights,
    compute_loss,
)
from worker.metrics import SPIKE_RATIO, MetricSums, SplitMetrics, compute_spike_ratios
from worker.model import BetaVAE, VAEOutput, choose_weight_seed
from worker.optimizer import Adam, compute_learning_rate

_EVALUATION_BATCH_SIZE = 500


class NonFiniteLossError(LosslabError, ArithmeticError):
    """The loss or its gradient became NaN or infinite; the weights are those before it."""

    def __init__(self, *, epoch: int, step: int) -> None:
        super().__init__(
            f"the loss became NaN or infinite in epoch {epoch}, step {step}; "
            "a lower learning_rate usually helps"
        )


class TrainingStopped(Exception):  # noqa: N818 - not an error: a stop was requested
    """`should_stop` returned True; the current step was finished, and its state can be saved."""


class TrainingState(NamedTuple):
    """All that a later process needs to continue exactly: weights, Adam's state and, inside an
    epoch, its sums, its losses and its random generator. On the host."""

    tensors: dict[str, Tensor]
    epoch: int  # epochs completed
    step: int  # steps done in the epoch after it

    @property
    def is_finite(self) -> bool:
        """Whether the loss of every step so far is finite; if not, its epoch fails."""
        losses = self.tensors.get("step_losses")
        return losses is None or bool(losses.isfinite().all())


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochResult:
    """The results of one epoch; `beta` and `learning_rate` are those of its last step."""

    epoch: int
    train: SplitMetrics
    val: EvaluationMetrics
    beta: float
    learning_rate: float
    num_loss_spikes: int
    max_spike_ratio: float | None
    seconds: float
    grids_per_second: float


@dataclass(slots=True)
class _EpochUnderWay:
    """The results of an epoch up to its current step; all of it is in the saved state."""

    order: Tensor  # of the training grids; follows from the seed and is not saved
    sums: MetricSums
    step_losses: Tensor
    step: int = 0
    seconds: float = 0.0  # of the steps before the last resume


class Trainer:
    """Trains one β-VAE by its configuration, on one device.

    Everything random in an epoch comes from one generator that is seeded by the job's seed and
    the epoch, and β and the learning rate are functions of the step.
    """

    def __init__(
        self,
        config: TrainingConfig,
        dataset: Dataset,
        *,
        device: torch.device,
        should_stop: Callable[[], bool] = lambda: False,
        on_step: Callable[["Trainer"], None] = lambda _trainer: None,
    ) -> None:
        self.config = config
        self.device = device
        self._should_stop = should_stop
        self._on_step = on_step
        self.epoch = 0  # epochs completed
        self._under_way: _EpochUnderWay | None = None
        self._train_grids = DeviceGrids(dataset.train, device=device)
        self._val_grids = DeviceGrids(dataset.val, device=device)
        self.batch_size = min(config.batch_size, self._train_grids.num_grids)
        # Whole batches only, so that every step has one shape; the remainder of an epoch's
        # shuffle is left out, a different one in each epoch.
        self.steps_per_epoch = self._train_grids.num_grids // self.batch_size
        self.num_steps = config.epochs * self.steps_per_epoch
        counts = torch.tensor(dataset.count_colours())
        self.class_weights = compute_class_weights(
            counts,
            weighting=config.class_weighting,
            effective_number_beta=config.effective_number_beta,
        ).to(device)
        make_deterministic()
        self._generator = torch.Generator(device=device)
        self._inputs = StepInputs(batch_size=self.batch_size, device=device)
        self._sums = MetricSums(latent_dim=config.latent_dim, device=device)
        self._log_prior = compute_log_prior(counts, class_weights=self.class_weights)
        self._val_sums = self._make_evaluation_sums(self._val_grids)
        self._step_losses = torch.zeros(self.steps_per_epoch, device=device)
        self._forget_graphs()
        with sharing_device, torch.random.fork_rng(devices=[]):
            torch.manual_seed(choose_weight_seed(config))
            model = BetaVAE(latent_dim=config.latent_dim, grid_size=dataset.grid_size)
        # PyTorch's stubs have no memory format for modules.
        self.model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._optimizer = Adam(
            self.model.parameters(), learning_rate=config.learning_rate, device=device
        )

    @property
    def progress(self) -> float:
        """Share of all planned steps that is done."""
        step = self._under_way.step if self._under_way else 0
        return (self.epoch * self.steps_per_epoch + step) / self.num_steps

    def epochs(self) -> Iterator[EpochResult]:
        """Train the remaining epochs. Raises NonFiniteLossError and TrainingStopped."""
        while self.epoch < self.config.epochs:
            yield self._run_epoch()

    def evaluate(self, grids: DeviceGrids, *, beta: float) -> EvaluationMetrics:
        """Measure a split in eval mode; the model is left in the mode it was in.

        Raises TrainingStopped.
        """
        was_training = self.model.training
        self.model.eval()
        sums = self._make_evaluation_sums(grids)
        try:
            with torch.inference_mode():
                for batch in grids.batches(_EVALUATION_BATCH_SIZE):
                    if self._should_stop():
                        raise TrainingStopped
                    output, loss = self._forward(batch, beta=beta)
                    sums.add(loss, output=output, grids=batch)
        finally:
            self.model.train(was_training)
        return sums.compute()

    def copy_state(self) -> TrainingState:
        """The state after the last step, as a copy on the host."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
        under_way = self._under_way
        if under_way is not None:
            tensors |= {f"sums.{name}": t for name, t in under_way.sums.state_dict().items()}
            tensors["step_losses"] = under_way.step_losses
            tensors["generator"] = self._generator.get_state()
            tensors["seconds"] = torch.tensor(under_way.seconds, dtype=torch.float64)
        on_host = {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in tensors.items()
        }
        return TrainingState(on_host, self.epoch, under_way.step if under_way else 0)

    def load_state(self, state: TrainingState) -> bool:
        """Continue where `state` was copied, as if this trainer had reached it by itself.

        Returns whether the random numbers continue too. Inside an epoch they cannot if the state
        comes from another kind of device: the rest of that epoch then gets other random numbers.
        """
        self.load_weights(state)
        for name, parameter in self.model.named_parameters():
            self._optimizer.state[parameter] = {
                key: value.to(self.device, copy=True, memory_format=_memory_format(value))
                for key, value in _select(state.tensors, prefix=f"optimizer.{name}.").items()
            }
        # Adam's state has new addresses.
        self._forget_graphs()
        self.epoch = state.epoch
        self._under_way = None
        if "generator" not in state.tensors:
            return True
        under_way = self._under_way = self._begin_epoch()
        under_way.sums.load_state_dict(_select(state.tensors, prefix="sums."))
        under_way.step_losses.copy_(state.tensors["step_losses"])
        under_way.step = state.step
        under_way.seconds = state.tensors["seconds"].item()
        generator = state.tensors["generator"]
        is_alike = generator.numel() == self._generator.get_state().numel()
        if is_alike:
            self._generator.set_state(generator)
        return is_alike

    def load_weights(self, state: TrainingState) -> None:
        """Take the model's weights alone, to evaluate with them."""
        self.model.load_state_dict(_select(state.tensors, prefix="model."))

    def _begin_epoch(self) -> _EpochUnderWay:
        self._generator.manual_seed(self.config.seed * 1_000_003 + self.epoch)
        self._sums.reset()
        self._step_losses.zero_()
        order = torch.randperm(
            self._train_grids.num_grids, generator=self._generator, device=self.device
        )
        return _EpochUnderWay(order, self._sums, self._step_losses)

    def _run_epoch(self) -> EpochResult:
        if self._under_way is None:
            self._under_way = self._begin_epoch()
        under_way, seconds_before = self._under_way, self._under_way.seconds
        started = time.perf_counter()
        self._run_steps(under_way)
        # Only reading the losses waits for the device, once per epoch.
        losses = under_way.step_losses.cpu().numpy()
        if not np.isfinite(losses).all():
            raise NonFiniteLossError(
                epoch=self.epoch + 1, step=int(np.flatnonzero(~np.isfinite(losses))[0]) + 1
            )
        train = under_way.sums.compute()
        train_seconds = seconds_before + time.perf_counter() - started
        last_step = (self.epoch + 1) * self.steps_per_epoch - 1
        beta = self._beta(last_step)
        val = self._validate(beta=beta)
        if not math.isfinite(val.loss):
            raise NonFiniteLossError(epoch=self.epoch + 1, step=self.steps_per_epoch)
        self.epoch += 1
        self._under_way = None
        ratios = compute_spike_ratios(losses)
        return EpochResult(
            epoch=self.epoch,
            train=train,
            val=val,
            beta=beta,
            learning_rate=self._learning_rate(last_step),
            num_loss_spikes=int((ratios > SPIKE_RATIO).sum()),
            max_spike_ratio=float(ratios.max()) if ratios.size else None,
            seconds=seconds_before + time.perf_counter() - started,
            grids_per_second=self.steps_per_epoch * self.batch_size / train_seconds,
        )

    def _run_steps(self, epoch: _EpochUnderWay) -> None:
        """The remaining steps of an epoch; a stop between two of them loses nothing."""
        self.model.train()
        seconds_before, started = epoch.seconds, time.perf_counter()
        if not self._is_captured:
            self._capture()
        first_step = self.epoch * self.steps_per_epoch
        while epoch.step < self.steps_per_epoch:
            if self._should_stop():
                raise TrainingStopped
            step = first_step + epoch.step
            beta = self._beta(step)
            self._optimizer.set_learning_rate(self._learning_rate(step))
            indices = epoch.order[epoch.step * self.batch_size :][: self.batch_size]
            self._inputs.fill(indices, position=epoch.step, beta=beta)
            self._step()
            epoch.step += 1
            epoch.seconds = seconds_before + time.perf_counter() - started
            self._on_step(self)

    def _beta(self, step: int) -> float:
        return compute_beta(self.config, step=step, num_steps=self.num_steps)

    def _learning_rate(self, step: int) -> float:
        return compute_learning_rate(self.config, step=step, num_steps=self.num_steps)

    def _forget_graphs(self) -> None:
        """On a GPU the next epoch makes new ones."""
        self._step, self._validation = self._train_step, self._sum_validation
        self._is_captured = self.device.type != "cuda"

    def _capture(self) -> None:
        """Capture a step and the validation as graphs, without a change to any number."""
        self._is_captured = True
        step = capture(
            self._train_step,
            name="training step",
            generator=self._generator,
            warming_up=self._unchanged(),
        )
        if step is None:
            return  # what prevents the capture of a step prevents that of the validation, too
        self._step = step
        self.model.eval()
        validation = capture(self._sum_validation, name="validation", generator=self._generator)
        self._validation = validation or self._sum_validation
        self.model.train()

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Undo what steps in here do to the epoch. Weights and moments do not change: Adam skips
        them, as after a loss that is not finite."""
        sums, losses = self._sums.state_dict(), self._step_losses.clone()
        generator = self._generator.get_state()
        self._optimizer.found_inf.fill_(1.0)
        try:
            yield
        finally:
            self._sums.load_state_dict(sums)
            self._step_losses.copy_(losses)
            self._generator.set_state(generator)
            self._optimizer.found_inf.fill_(0.0)

    def _train_step(self) -> None:
        """One step of Adam with the values in `_inputs`; its mean loss goes to `_step_losses`,
        NaN if it or a gradient is not finite. Nothing here waits for the device."""
        grids = self._draw(self._inputs.indices)
        output, loss = self._forward(grids, beta=self._inputs.beta)
        mean_loss = loss.total.mean()
        # The optimizer's own zero_grad would import the compiler; see Adam.
        self.model.zero_grad(set_to_none=True)
        torch.autograd.backward(mean_loss)
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), self.config.max_grad_norm, foreach=True
        )
        is_finite = torch.isfinite(mean_loss.detach() + norm)
        found_inf = self._optimizer.found_inf
        found_inf.copy_(torch.maximum(found_inf, (~is_finite).float()))
        self._optimizer.step()
        self._sums.add(loss, logits=output.logits, grids=grids)
        step_loss = torch.where(is_finite, mean_loss.detach(), torch.nan)
        self._step_losses.index_copy_(0, self._inputs.position, step_loss.unsqueeze(0))

    def _make_evaluation_sums(self, grids: DeviceGrids) -> EvaluationSums:
        return EvaluationSums(
            num_grids=grids.num_grids,
            latent_dim=self.config.latent_dim,
            log_prior=self._log_prior,
            seed=self.config.seed,
            device=self.device,
        )

    def _validate(self, *, beta: float) -> EvaluationMetrics:
        if self.device.type != "cuda":
            return self.evaluate(self._val_grids, beta=beta)
        self.model.eval()
        self._inputs.beta.fill_(beta)
        self._validation()
        self.model.train()
        return self._val_sums.compute()

    @torch.no_grad()
    def _sum_validation(self) -> None:
        self._val_sums.reset()
        for batch in self._val_grids.batches(_EVALUATION_BATCH_SIZE):
            output, loss = self._forward(batch, beta=self._inputs.beta)
            self._val_sums.add(loss, output=output, grids=batch)

    def _forward(self, grids: Tensor, *, beta: float | Tensor) -> tuple[VAEOutput, GridLoss]:
        with autocast(self.device):
            output: VAEOutput = self.model(grids, generator=self._generator)
        loss = compute_loss(
            output,
            grids=grids,
            class_weights=self.class_weights,
            focal_gamma=self.config.focal_gamma if self.config.use_focal_loss else 0.0,
            beta=beta,
            free_bits=self.config.free_bits,
        )
        return output, loss

    def _draw(self, indices: Tensor) -> Tensor:
        if not self.config.augment:
            return self._train_grids.draw(indices)
        symmetries = torch.randint(8, indices.shape, generator=self._generator, device=self.device)
        return self._train_grids.draw(indices, symmetries=symmetries)


def _select(tensors: dict[str, Tensor], *, prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _memory_format(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
