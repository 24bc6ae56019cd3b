"""The weights of a model in one piece of memory, so that a step casts, clips and updates all of
them at once instead of one by one."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor, nn

#: Elements. cuDNN takes slower kernels for weights that begin anywhere.
_ALIGNMENT: Final = 128


class FlatWeights:
    """All weights of `model`, which keeps its parameters.

    `master` (N,) holds them one after the other in float32. The parameters of the model become
    views of a copy in `dtype`, in which the device computes; of `master` itself if that is
    float32. Weights with four dimensions are in channels-last order.
    """

    def __init__(self, model: nn.Module, *, dtype: torch.dtype) -> None:
        named = dict(model.named_parameters())
        self._shapes = {name: parameter.shape for name, parameter in named.items()}
        sizes = [_align(parameter.numel()) for parameter in named.values()]
        starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
        self._places = list(pairwise(starts))
        device = next(iter(named.values())).device
        self.master = torch.zeros(starts[-1], device=device)
        with torch.no_grad():
            for name, view in self.view(self.master).items():
                view.copy_(named[name])
        self._working = self.master if dtype == torch.float32 else self.master.to(dtype)
        self.parameters = _replace_parameters(model, self.view(self._working))
        self._gap = torch.zeros(_ALIGNMENT, dtype=dtype, device=device)

    def view(self, flat: Tensor) -> dict[str, Tensor]:
        """The part of each parameter in `flat` (N,), by its name and in its shape."""
        return {
            name: _shape(flat[start:], shape=shape)
            for (start, _), (name, shape) in zip(self._places, self._shapes.items(), strict=True)
        }

    def flatten(self, gradients: Sequence[Tensor]) -> Tensor:
        """The gradients of `parameters`, as one tensor (N,) float32 in the order of `master`."""
        return torch.cat(list(self._pad(gradients))).float()

    def use_master(self) -> None:
        """Let the model compute with what `master` holds now."""
        if self._working is not self.master:
            self._working.copy_(self.master)

    def _pad(self, gradients: Sequence[Tensor]) -> Iterator[Tensor]:
        for gradient in gradients:
            flat = gradient.permute(0, 2, 3, 1) if gradient.ndim == 4 else gradient
            yield flat.reshape(-1)
            yield self._gap[: -gradient.numel() % _ALIGNMENT]


def _align(num_elements: int) -> int:
    return num_elements + -num_elements % _ALIGNMENT


def _shape(flat: Tensor, *, shape: torch.Size) -> Tensor:
    """The first elements of `flat` as a tensor of `shape`."""
    elements = flat[: shape.numel()]
    if len(shape) != 4:
        return elements.view(shape)
    outer, inner, height, width = shape
    return elements.view(outer, height, width, inner).permute(0, 3, 1, 2)


def _replace_parameters(model: nn.Module, views: dict[str, Tensor]) -> list[nn.Parameter]:
    for name, view in views.items():
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, nn.Parameter(view))
    return list(model.parameters())
