"""Convolutions with a quick backward pass; otherwise they are PyTorch's own.

On a CPU: for the gradient of a strided convolution's weights, oneDNN takes 1.3 to 2 times as long
as making patches and one matrix product over them; for the gradient of a transposed convolution's
bias it reads everything a second time. Here they are that product and one sum.

On a GPU the same product is quicker for the convolutions from and to ten colours, which are padded
to sixteen: its matrix units take no fewer.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_CHANNELS = 16
_backward = torch.ops.aten.convolution_backward


class Conv2d(nn.Conv2d):
    """As `nn.Conv2d`, for square kernels with padding 1."""

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu" or self.stride == (1, 1):
            return super().forward(input)
        output: Tensor = _StridedConvolution.apply(input, self.weight, self.bias, self.stride[0])  # type: ignore[no-untyped-call]
        return output


class ConvTranspose2d(nn.ConvTranspose2d):
    """As `nn.ConvTranspose2d`, for square kernels with padding 1."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if input.device.type != "cpu":
            return super().forward(input, output_size)
        output: Tensor = _TransposedConvolution.apply(input, self.weight, self.bias, self.stride[0])  # type: ignore[no-untyped-call]
        return output


class ColourConv2d(nn.Conv2d):
    """As `nn.Conv2d`, for square kernels with padding 1 and few channels on one side."""

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type == "cpu":
            return super().forward(input)
        assert self.bias is not None
        return convolve_padded(input, self.weight, self.bias)


def convolve_padded(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve `input` (B, C, S, S) with `weight` (D, C, k, k) and padding 1, with channels of
    zeros up to the next multiple of `_CHANNELS`."""
    num_out, num_in = weight.shape[:2]
    more_in, more_out = -num_in % _CHANNELS, -num_out % _CHANNELS
    output: Tensor = _StridedConvolution.apply(  # type: ignore[no-untyped-call]
        functional.pad(input, (0, 0, 0, 0, 0, more_in)),
        functional.pad(weight, (0, 0, 0, 0, 0, more_in, 0, more_out)),
        functional.pad(bias, (0, more_out)),
        1,
    )
    return output[:, :num_out]


class _StridedConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.stride = stride
        return functional.conv2d(input, weight, bias, stride, padding=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        input, weight = ctx.saved_tensors
        grad_input = _backward(
            grad, input, weight, None, [ctx.stride] * 2, [1, 1], [1, 1], False, [0, 0], 1,
            [True, False, False],
        )[0]  # fmt: skip
        grad_weight = _compute_weight_gradient(grad, wide=input, stride=ctx.stride, like=weight)
        return grad_input, grad_weight, grad.sum((0, 2, 3)), None


class _TransposedConvolution(torch.autograd.Function):
    """Its backward pass is a convolution, and its weights' gradient that of one, with the roles
    of input and output exchanged."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.stride = stride
        return functional.conv_transpose2d(input, weight, bias, stride, padding=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        input, weight = ctx.saved_tensors
        grad_input = functional.conv2d(grad, weight, None, ctx.stride, padding=1)
        grad_weight = _compute_weight_gradient(input, wide=grad, stride=ctx.stride, like=weight)
        return grad_input, grad_weight, grad.sum((0, 2, 3)), None


def _compute_weight_gradient(narrow: Tensor, *, wide: Tensor, stride: int, like: Tensor) -> Tensor:
    """Gradient of the weights (D, C, k, k) that lead from `wide` (B, C, S, S) to `narrow`
    (B, D, S/stride, S/stride): each of its positions times the patch that it was made of."""
    size = like.shape[-1]
    patches = _gather_patches(wide, size=size, stride=stride)
    positions = narrow.permute(0, 2, 3, 1).reshape(-1, narrow.shape[1])
    product = (positions.t() @ patches).view(-1, size, size, wide.shape[1])
    return product.permute(0, 3, 1, 2)  # channels-last, as the weights are


def _gather_patches(images: Tensor, *, size: int, stride: int) -> Tensor:
    """The k x k patches of `images` (B, C, S, S) padded by 1, as rows of k * k * C numbers.

    In channels-last memory a patch is k runs of k * C numbers, so that this is quick.
    """
    padded = functional.pad(images.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    per_grid, per_row, per_column, _ = padded.stride()
    batch, channels, height, _ = images.shape
    side = (height + 2 - size) // stride + 1
    patches = padded.as_strided(
        (batch, side, side, size, size * channels),
        (per_grid, per_row * stride, per_column * stride, per_row, 1),
    )
    return patches.reshape(batch * side * side, size * size * channels)
