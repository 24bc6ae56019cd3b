"""Losslab's convolutions compared with PyTorch's own."""

import pytest
import torch
from torch import Tensor, nn

from worker.convolution import Conv2d, ConvTranspose2d

LAYERS = [
    (Conv2d, nn.Conv2d, 3, 2),
    (Conv2d, nn.Conv2d, 3, 1),
    (ConvTranspose2d, nn.ConvTranspose2d, 4, 2),
]


def run(layer: nn.Module, images: Tensor, *, is_bf16: bool) -> list[Tensor]:
    """Output and all gradients, as float32."""
    images = images.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_bf16):
        output: Tensor = layer(images)
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
