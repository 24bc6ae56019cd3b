"""The training loop. A `Trainer` yields one `EpochResult` per epoch; it uses neither the database
nor files."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from server.errors import LosslabError
from server.models.configuration import TrainingConfig
from worker.capture import capture
from worker.data import Dataset, DeviceGrids
from worker.evaluation import EvaluationMetrics, EvaluationSums, compute_log_prior
from worker.losses import (
    compute_beta,
    compute_class_weights,
    compute_loss,
)
from worker.metrics import SPIKE_RATIO, SplitMetrics, compute_spike_ratios
from worker.optimizer import compute_learning_rate
from worker.step import StepPath, TrainingStep

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
    path: StepPath | None = None  # of the steps; older versions did not say it

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
        self._val_grids = DeviceGrids(dataset.val, device=device)
        counts = torch.tensor(dataset.count_colours())
        self.class_weights = compute_class_weights(
            counts,
            weighting=config.class_weighting,
            effective_number_beta=config.effective_number_beta,
        ).to(device)
        train_grids = DeviceGrids(dataset.train, device=device)
        self._step = TrainingStep(config, train_grids, class_weights=self.class_weights)
        self.model = self._step.model
        self.steps_per_epoch = self._step.steps_per_epoch
        self.num_steps = config.epochs * self.steps_per_epoch
        self._log_prior = compute_log_prior(counts, class_weights=self.class_weights)
        self._val_sums = self._make_evaluation_sums(self._val_grids)
        self._val_beta = torch.zeros((), device=device)
        self._validation: Callable[[], None] = self._sum_validation
        self._path_before: StepPath | None = None
        self._is_prepared = False

    @property
    def path(self) -> StepPath:
        """How the steps are launched."""
        return self._step.path

    def prepare(self) -> bool:
        """On a GPU, compile and capture what the epochs do there; to be called after `load_state`.

        Returns whether the steps are launched as before the state was saved, or there was none.
        """
        self._is_prepared = True
        before = self._path_before
        self._step.prepare(best=before or StepPath.compiled)
        if self.path is not StepPath.plain:
            # What prevents the capture of a step prevents that of the validation, too.
            validation = capture(
                self._sum_validation, name="validation", generator=self._step.generator
            )
            self._validation = validation or self._sum_validation
        return before in (None, self.path)

    @property
    def progress(self) -> float:
        """Share of all planned steps that is done."""
        step = self._under_way.step if self._under_way else 0
        return (self.epoch * self.steps_per_epoch + step) / self.num_steps

    def epochs(self) -> Iterator[EpochResult]:
        """Train the remaining epochs. Raises NonFiniteLossError and TrainingStopped."""
        if not self._is_prepared:
            self.prepare()
        while self.epoch < self.config.epochs:
            yield self._run_epoch()

    def evaluate(self, grids: DeviceGrids, *, beta: float) -> EvaluationMetrics:
        """Measure a split, with z = mu.

        Raises TrainingStopped.
        """
        sums = self._make_evaluation_sums(grids)
        with torch.inference_mode():
            for batch in grids.batches(_EVALUATION_BATCH_SIZE):
                if self._should_stop():
                    raise TrainingStopped
                self._add_batch(sums, batch, beta=beta)
        return sums.compute()

    def copy_state(self) -> TrainingState:
        """The state after the last step, as a copy on the host."""
        step = self._step
        tensors = {f"model.{n}": t for n, t in step.weights.view(step.weights.master).items()}
        tensors |= {f"optimizer.{n}": t for n, t in self._view_moments().items()}
        under_way = self._under_way
        if under_way is not None:
            tensors |= {f"sums.{name}": t for name, t in step.sums.state_dict().items()}
            tensors["step_losses"] = step.losses
            tensors["generator"] = step.generator.get_state()
            tensors["seconds"] = torch.tensor(under_way.seconds, dtype=torch.float64)
        on_host = {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in tensors.items()
        }
        return TrainingState(
            on_host, self.epoch, under_way.step if under_way else 0, path=self.path
        )

    def load_state(self, state: TrainingState) -> bool:
        """Continue where `state` was copied, as if this trainer had reached it by itself.

        Returns whether the random numbers continue too. Inside an epoch they cannot if the state
        comes from another kind of device: the rest of that epoch then gets other random numbers.
        """
        step = self._step
        self.load_weights(state)
        for name, moment in self._view_moments().items():
            moment.copy_(state.tensors[f"optimizer.{name}"])
        if state.path is not StepPath.plain:  # a CPU has no other
            self._path_before = state.path
        self.epoch = state.epoch
        self._under_way = None
        if "generator" not in state.tensors:
            return True
        under_way = self._under_way = self._begin_epoch()
        step.sums.load_state_dict(_select(state.tensors, prefix="sums."))
        step.losses.copy_(state.tensors["step_losses"])
        under_way.step = state.step
        under_way.seconds = state.tensors["seconds"].item()
        generator = state.tensors["generator"]
        is_alike = generator.numel() == step.generator.get_state().numel()
        if is_alike:
            step.generator.set_state(generator)
        return is_alike

    def load_weights(self, state: TrainingState) -> None:
        """Take the model's weights alone, to evaluate with them."""
        weights = self._step.weights
        with torch.no_grad():
            for name, view in weights.view(weights.master).items():
                view.copy_(state.tensors[f"model.{name}"])
        weights.use_master()

    def _view_moments(self) -> dict[str, Tensor]:
        """What Adam knows of each parameter, in the names of PyTorch's own."""
        adam, view = self._step.adam, self._step.weights.view
        moments = {}
        for name in view(adam.weights):
            moments[f"{name}.step"] = adam.num_steps
        for kind, flat in {"exp_avg": adam.exp_avg, "exp_avg_sq": adam.exp_avg_sq}.items():
            moments |= {f"{name}.{kind}": moment for name, moment in view(flat).items()}
        return moments

    def _begin_epoch(self) -> _EpochUnderWay:
        return _EpochUnderWay(self._step.begin_epoch(self.config.seed * 1_000_003 + self.epoch))

    def _run_epoch(self) -> EpochResult:
        if self._under_way is None:
            self._under_way = self._begin_epoch()
        under_way, seconds_before = self._under_way, self._under_way.seconds
        started = time.perf_counter()
        self._run_steps(under_way)
        # Only reading the losses waits for the device, once per epoch.
        losses = self._step.losses.cpu().numpy()
        if not np.isfinite(losses).all():
            raise NonFiniteLossError(
                epoch=self.epoch + 1, step=int(np.flatnonzero(~np.isfinite(losses))[0]) + 1
            )
        train = self._step.sums.compute()
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
            grids_per_second=self.steps_per_epoch * self._step.batch_size / train_seconds,
        )

    def _run_steps(self, epoch: _EpochUnderWay) -> None:
        """The remaining steps of an epoch; a stop between two of them loses nothing."""
        seconds_before, started = epoch.seconds, time.perf_counter()
        batch_size = self._step.batch_size
        first_step = self.epoch * self.steps_per_epoch
        while epoch.step < self.steps_per_epoch:
            if self._should_stop():
                raise TrainingStopped
            step = first_step + epoch.step
            self._step.run(
                epoch.order[epoch.step * batch_size :][:batch_size],
                position=epoch.step,
                beta=self._beta(step),
                learning_rate=self._learning_rate(step),
            )
            epoch.step += 1
            epoch.seconds = seconds_before + time.perf_counter() - started
            self._on_step(self)

    def _beta(self, step: int) -> float:
        return compute_beta(self.config, step=step, num_steps=self.num_steps)

    def _learning_rate(self, step: int) -> float:
        return compute_learning_rate(self.config, step=step, num_steps=self.num_steps)

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
        self._val_beta.fill_(beta)
        self._validation()
        return self._val_sums.compute()

    @torch.no_grad()
    def _sum_validation(self) -> None:
        self._val_sums.reset()
        for batch in self._val_grids.batches(_EVALUATION_BATCH_SIZE):
            self._add_batch(self._val_sums, batch, beta=self._val_beta)

    def _add_batch(self, sums: EvaluationSums, grids: Tensor, *, beta: float | Tensor) -> None:
        output = self.model(grids)
        loss = compute_loss(output, grids=grids, beta=beta, **self._step.objective)
        sums.add(loss, output=output, grids=grids)


def _select(tensors: dict[str, Tensor], *, prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
