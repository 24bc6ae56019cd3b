"""Adam, and the learning rate that it has at each step."""

import math

import torch
from torch import Tensor
from torch.optim.adam import adam

from server.models.configuration import TrainingConfig
from worker.capture import compiled

_DECAYS = 0.9, 0.999  # of the two moments
_EPSILON = 1e-8


def compute_learning_rate(config: TrainingConfig, *, step: int, num_steps: int) -> float:
    """Cosine decay from `learning_rate` to `min_learning_rate` (Loshchilov & Hutter, 2017); a
    `learning_rate` below `min_learning_rate` stays as it is, since a decay never rises."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / max(1, num_steps - 1)))
    lowest = min(config.min_learning_rate, config.learning_rate)
    return lowest + cosine * (config.learning_rate - lowest)


class Adam:
    """Adam (Kingma & Ba, 2015) of one tensor of weights (N,), which it changes in place.

    All of its state keeps its address. On a GPU nothing waits for the device. From the first loss
    or gradient that is not finite on, weights and moments stay as they are.
    """

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(weights), torch.zeros_like(weights)
        self.num_steps = torch.zeros((), device=weights.device)
        self.learning_rate = torch.zeros((), device=weights.device)
        self._rate = 0.0
        self.is_finite = torch.ones((), dtype=torch.bool, device=weights.device)
        self.is_compiled = False

    def set_learning_rate(self, rate: float) -> None:
        self._rate = rate
        self.learning_rate.fill_(rate)  # a graph reads it on the device

    @torch.no_grad()
    def step(self, gradient: Tensor, *, loss: Tensor, max_norm: float) -> Tensor:
        """Change the weights by `gradient` (N,), clipped to `max_norm` (Pascanu et al., 2013).

        Returns whether every loss and gradient so far was finite, as a tensor ().
        """
        norm = torch.linalg.vector_norm(gradient)
        self.is_finite &= torch.isfinite(loss + norm)
        divisor = ((norm + 1e-6) / max_norm).clamp(min=1.0)
        if gradient.device.type == "cpu":
            self._step_on_cpu(gradient, divisor=divisor)
            return self.is_finite
        self.num_steps += self.is_finite
        update = update_without_asking
        (compiled(update) if self.is_compiled else update)(
            self.weights,
            self.exp_avg,
            self.exp_avg_sq,
            torch.where(self.is_finite, gradient / divisor, 0.0),
            # Nothing is divided by zero if the first step is not finite.
            num_steps=self.num_steps.clamp(min=1.0),
            learning_rate=self.learning_rate,
            share=self.is_finite.float(),
        )
        return self.is_finite

    def _step_on_cpu(self, gradient: Tensor, *, divisor: Tensor) -> None:
        """PyTorch's own: one pass over the memory, where `update_without_asking` would make ten."""
        adam(
            [self.weights],
            [gradient],
            [self.exp_avg],
            [self.exp_avg_sq],
            [],
            [self.num_steps],
            fused=True,
            grad_scale=divisor,
            found_inf=(~self.is_finite).float(),
            amsgrad=False,
            beta1=_DECAYS[0],
            beta2=_DECAYS[1],
            lr=self._rate,
            weight_decay=0.0,
            eps=_EPSILON,
            maximize=False,
        )


def update_without_asking(
    weights: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient: Tensor,
    *,
    num_steps: Tensor,
    learning_rate: Tensor,
    share: Tensor,
) -> None:
    """A step of which `share`, 0 or 1, is made: nothing asks the host."""
    exp_avg.lerp_(gradient, (1 - _DECAYS[0]) * share)
    exp_avg_sq.lerp_(gradient.square(), (1 - _DECAYS[1]) * share)
    corrections = [1 - decay**num_steps for decay in _DECAYS]
    root = (exp_avg_sq / corrections[1]).sqrt() + _EPSILON
    weights.sub_(exp_avg / root * (learning_rate * share / corrections[0]))
