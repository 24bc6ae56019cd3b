"""The pictures."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from worker.atomic import generate_atomic
from worker.model import BetaVAE, VAEOutput
from worker.pictures import PALETTE, plot_reconstructions, reconstruct, render_reconstructions

CPU = torch.device("cpu")


class Echo(torch.nn.Module):
    """Reconstructs every grid exactly."""

    def forward(self, grids: torch.Tensor) -> VAEOutput:
        one_hot = torch.nn.functional.one_hot(grids.long(), 10).permute(0, 3, 1, 2)
        return VAEOutput(one_hot * 50.0, torch.zeros(len(grids), 1), torch.zeros(len(grids), 1))


@pytest.fixture(scope="module")
def batches() -> list[torch.Tensor]:
    grids = torch.from_numpy(generate_atomic(num_grids=40, seed=3))
    return list(grids.split(4))


@pytest.mark.parametrize("is_training", [True, False])
def test_plot_restores_the_mode_it_found(
    batches: list[torch.Tensor], tmp_path: Path, is_training: bool
) -> None:
    model = BetaVAE(latent_dim=2).train(is_training)
    plot_reconstructions(model, batches, CPU, save_path=tmp_path / "p.png", show=False)
    assert model.training is is_training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_plot_restores_the_mode_when_the_model_raises(batches: list[torch.Tensor]) -> None:
    model = BetaVAE(latent_dim=2, grid_size=8).train()
    with pytest.raises(RuntimeError):
        plot_reconstructions(model, batches, CPU, show=False)
    assert model.training


def test_plot_takes_the_first_grid_of_each_of_num_samples_batches(
    batches: list[torch.Tensor],
) -> None:
    samples = plot_reconstructions(BetaVAE(latent_dim=2), batches, CPU, num_samples=7, show=False)
    assert len(samples) == 7
    for sample, batch in zip(samples, batches, strict=False):
        assert np.array_equal(sample.original, batch[0])


def test_each_sample_has_its_numbers(batches: list[torch.Tensor]) -> None:
    (sample,) = reconstruct(Echo(), batches, device=CPU, num_samples=1)
    assert sample.pixel_accuracy == 1.0
    assert sample.foreground_recall == 1.0
    assert sample.loss == pytest.approx(0.0, abs=1e-6)
    assert sample.values() == {
        "pixel_accuracy": 1.0,
        "foreground_recall": 1.0,
        "loss": sample.loss,
        "matched_accuracy": None,
        "matched_recall": None,
    }


def test_reconstruction_at_the_true_share_is_argmax_after_the_shift(
    batches: list[torch.Tensor],
) -> None:
    model = BetaVAE(latent_dim=2).eval()
    plain = reconstruct(model, batches, device=CPU, num_samples=4)
    for shift in (0.0, 0.1, -100.0, 100.0):
        samples = reconstruct(model, batches, device=CPU, num_samples=4, matched_shift=shift)
        for index, sample in enumerate(samples):
            with torch.no_grad():
                logits = model(batches[index][:1]).logits[0]
            logits[0] -= shift
            assert sample.matched is not None
            assert np.array_equal(sample.matched, logits.argmax(0))
            assert sample.matched_accuracy == (sample.matched == sample.original).mean()
            assert np.array_equal(sample.reconstruction, plain[index].reconstruction)
            if abs(shift) == 100:
                assert (sample.matched > 0).all() == (shift > 0)


def test_a_grid_without_foreground_has_no_foreground_recall() -> None:
    black = torch.zeros(1, 16, 16, dtype=torch.uint8)
    (sample,) = reconstruct(Echo(), [black], device=CPU, num_samples=1)
    assert sample.foreground_recall is None


@pytest.mark.parametrize("matched_shift", [None, 0.5])
def test_ten_samples_fit_on_one_screen_in_the_colours_of_arc(
    batches: list[torch.Tensor], tmp_path: Path, matched_shift: float | None
) -> None:
    samples = reconstruct(Echo(), batches, device=CPU, num_samples=10, matched_shift=matched_shift)
    render_reconstructions(samples, tmp_path / "p.png", title="$x_{$ is no formula")
    with Image.open(tmp_path / "p.png") as file:
        image = file.convert("RGB")
    assert image.width <= 1920
    assert image.height <= 1080
    seen = {colour for _, colour in image.getcolors(2**24)}
    shown = {tuple(PALETTE[colour].tolist()) for s in samples for colour in np.unique(s.original)}
    assert shown <= seen


@pytest.mark.parametrize(("num_samples", "size"), [(1, 4), (3, 32), (6, 12)])
def test_other_numbers_and_sizes_are_drawn_too(num_samples: int, size: int, tmp_path: Path) -> None:
    batches = [torch.zeros(2, size, size, dtype=torch.uint8)] * num_samples
    model = BetaVAE(latent_dim=2, grid_size=size)
    plot_reconstructions(
        model, batches, "cpu", num_samples=num_samples, save_path=tmp_path / "p.png", show=False
    )
    with Image.open(tmp_path / "p.png") as image:
        assert image.width > 300


def test_importing_the_pictures_configures_no_logging() -> None:
    assert not logging.getLogger("worker").handlers
