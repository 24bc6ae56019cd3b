"""Losslab's convolutions compared with PyTorch's own."""

import pytest
import torch
from torch import Tensor, nn

from worker.convolution import Conv2d, ConvTranspose2d, convolve_padded

LAYERS = [
    (Conv2d, nn.Conv2d, 3, 2),
    (Conv2d, nn.Conv2d, 3, 1),
    (ConvTranspose2d, nn.ConvTranspose2d, 4, 2),
]


def run(layer: nn.Module, images: Tensor, *, is_bf16: bool) -> list[Tensor]:
    """Output and all gradients, as float32."""
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    images = images.to(dtype, copy=True).requires_grad_()
    output: Tensor = layer.to(dtype)(images)
    torch.autograd.backward(output.float().square().sum())
    found = [output, images.grad, *(parameter.grad for parameter in layer.parameters())]
    return [tensor.detach().float() for tensor in found if tensor is not None]


@pytest.mark.parametrize("is_bf16", [False, True])
@pytest.mark.parametrize("size", [4, 8, 32])
@pytest.mark.parametrize(("own", "theirs", "kernel", "stride"), LAYERS)
def test_output_and_gradients_are_those_of_pytorch(
    own: type[nn.Conv2d | nn.ConvTranspose2d],
    theirs: type[nn.Conv2d | nn.ConvTranspose2d],
    kernel: int,
    stride: int,
    size: int,
    is_bf16: bool,
) -> None:
    torch.manual_seed(0)
    reference = theirs(6, 10, kernel, stride=stride, padding=1)
    layer = own(6, 10, kernel, stride=stride, padding=1)
    layer.load_state_dict(reference.state_dict())
    images = torch.randn(3, 6, size, size).to(memory_format=torch.channels_last)
    tolerance = 0.02 if is_bf16 else 1e-5
    expected, found = (run(each, images, is_bf16=is_bf16) for each in (reference, layer))
    assert len(found) == 4
    for mine, right in zip(found, expected, strict=True):
        assert mine.shape == right.shape
        assert (mine - right).abs().max() <= tolerance * right.abs().max()


def test_a_gradient_has_the_memory_format_of_its_weights() -> None:
    layer = ConvTranspose2d(6, 10, 4, stride=2, padding=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    run(layer, torch.randn(3, 6, 8, 8), is_bf16=True)
    assert layer.weight.grad is not None
    assert layer.weight.grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_in", "num_out"), [(10, 32), (32, 10), (16, 16)])
def test_padded_channels_change_neither_output_nor_gradients(
    num_in: int, num_out: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(num_in, num_out, 3, padding=1).to(dtype)
    images = torch.randn(3, num_in, 8, 8, dtype=dtype).requires_grad_()
    operands = [images, *layer.parameters()]
    outputs = layer(images), convolve_padded(*operands)
    expected, found = (
        [output, *torch.autograd.grad(output.float().square().sum(), operands)]
        for output in outputs
    )
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
    for mine, right in zip(found, expected, strict=True):
        assert mine.shape == right.shape
        assert (mine - right).abs().max() <= tolerance * right.abs().max()
