"""All weights of a model in one tensor."""

import pytest
import torch
from torch import nn

from worker.model import BetaVAE
from worker.weights import FlatWeights


def make_model() -> BetaVAE:
    torch.manual_seed(0)
    return BetaVAE(latent_dim=3, grid_size=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model_computes_with_a_copy_of_the_master(dtype: torch.dtype) -> None:
    expected = make_model().state_dict()
    model = make_model()
    weights = FlatWeights(model, dtype=dtype)
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[n]) for n, t in weights.view(weights.master).items())
    assert all(torch.equal(t, expected[n].to(dtype)) for n, t in model.state_dict().items())
    weights.master += 1
    weights.use_master()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, (expected[name] + 1).to(dtype))


def test_weights_begin_where_kernels_want_them_and_images_are_channels_last() -> None:
    model = make_model()
    weights = FlatWeights(model, dtype=torch.bfloat16)
    for parameter in weights.parameters:
        assert parameter.storage_offset() % 128 == 0
        if parameter.ndim == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last)


def test_gradients_are_in_the_order_of_the_master() -> None:
    model = make_model()
    weights = FlatWeights(model, dtype=torch.float32)
    gradients = [torch.randn_like(parameter) for parameter in weights.parameters]
    flat = weights.flatten(gradients)
    assert flat.shape == weights.master.shape
    assert all(map(torch.equal, weights.view(flat).values(), gradients))
    # What lies between two weights never changes.
    assert flat.count_nonzero() <= sum(parameter.numel() for parameter in weights.parameters)


def test_gradients_of_any_memory_format_are_taken() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    weights = FlatWeights(model, dtype=torch.float32)
    gradients = [torch.randn(4, 3, 3, 3), torch.randn(4)]
    assert all(map(torch.equal, weights.view(weights.flatten(gradients)).values(), gradients))
