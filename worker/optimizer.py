"""Adam, and the learning rate that it has at each step."""

import inspect
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from server.models.configuration import TrainingConfig


def compute_learning_rate(config: TrainingConfig, *, step: int, num_steps: int) -> float:
    """Cosine decay from `learning_rate` to `min_learning_rate` (Loshchilov & Hutter, 2017); a
    `learning_rate` below `min_learning_rate` stays as it is, since a decay never rises."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / max(1, num_steps - 1)))
    lowest = min(config.min_learning_rate, config.learning_rate)
    return lowest + cosine * (config.learning_rate - lowest)


class Adam(torch.optim.Adam):
    """PyTorch's fused Adam. While `found_inf` () is 1 it leaves weights and moments alone, without
    asking the host."""

    # PyTorch's own wrappers of both import its compiler, to exclude them from it. That takes
    # a third of a worker's start, and nothing is compiled here. The wrapper of `step` also turns
    # gradients off.
    add_param_group = inspect.unwrap(torch.optim.Adam.add_param_group)
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))

    def __init__(
        self, parameters: Iterable[Tensor], *, learning_rate: float, device: torch.device
    ) -> None:
        is_cuda = device.type == "cuda"
        super().__init__(
            parameters,
            # A graph reads the rate on the device; on a CPU a tensor would only take time.
            lr=torch.tensor(learning_rate, device=device) if is_cuda else learning_rate,
            fused=True,
            capturable=is_cuda,
        )
        self.found_inf = torch.zeros((), device=device)

    def set_learning_rate(self, rate: float) -> None:
        for group in self.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
