"""The β-VAE (Kingma & Welling, 2014; Higgins et al., 2017) that every option trains."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from server.models.configuration import NUM_COLOURS, TrainingConfig
from worker.convolution import ColourConv2d, Conv2d, ConvTranspose2d

#: The initial weights' stream of a job's seed.
_INITIAL_WEIGHTS = 1


class VAEOutput(NamedTuple):
    """One forward pass over B grids of S x S cells.

    `logits` (B, 10, S, S), `mu` and `logvar` (B, latent_dim), all float32.
    """

    logits: Tensor
    mu: Tensor
    logvar: Tensor


class BetaVAE(nn.Module):
    """Convolutional β-VAE over grids of 10 colours, about 800,000 parameters at 16x16.

    It computes in the type of its weights. Without noise z is mu, so that the same grid always
    gives the same reconstruction.
    """

    def __init__(self, *, latent_dim: int, grid_size: int = 16) -> None:
        super().__init__()
        if grid_size % 4:
            raise ValueError(f"grid_size must be divisible by 4, not {grid_size}")
        self.latent_dim = latent_dim
        self.grid_size = grid_size
        small = grid_size // 4
        self.encoder = nn.Sequential(
            ColourConv2d(NUM_COLOURS, 32, 3, padding=1),
            nn.ReLU(inplace=True),
            Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            Conv2d(64, 128, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(128 * small * small, 128),
            nn.ReLU(inplace=True),
        )
        self.to_mu = nn.Linear(128, latent_dim)
        self.to_logvar = nn.Linear(128, latent_dim)
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, 128),
            nn.ReLU(inplace=True),
            nn.Linear(128, 128 * small * small),
            nn.ReLU(inplace=True),
            nn.Unflatten(1, (128, small, small)),
            ConvTranspose2d(128, 64, 4, stride=2, padding=1),
            nn.ReLU(inplace=True),
            ConvTranspose2d(64, 32, 4, stride=2, padding=1),
            nn.ReLU(inplace=True),
            ColourConv2d(32, NUM_COLOURS, 3, padding=1),
        )
        # Rows of the identity are the one-hot codes: one gather, and channels-last at once.
        self.register_buffer("_one_hot", torch.eye(NUM_COLOURS), persistent=False)

    def forward(self, grids: Tensor, *, noise: Tensor | None = None) -> VAEOutput:
        """Reconstruct `grids` (B, S, S) of integer colours 0-9; standard normal `noise`
        (B, latent_dim) makes z a draw from N(mu, exp(logvar))."""
        mu, logvar = self.encode(grids)
        z = mu if noise is None else mu + noise * torch.exp(0.5 * logvar)
        return VAEOutput(self.decode(z), mu, logvar)

    def encode(self, grids: Tensor) -> tuple[Tensor, Tensor]:
        """Return `mu` clamped to ±5 and `logvar` clamped to [-20, 2]."""
        codes = self.get_buffer("_one_hot").to(self.to_mu.weight.dtype)
        one_hot = codes[grids.long()].permute(0, 3, 1, 2)
        hidden = self.encoder(one_hot)
        mu = self.to_mu(hidden).float().clamp(-5.0, 5.0)
        logvar = self.to_logvar(hidden).float().clamp(-20.0, 2.0)
        return mu, logvar

    def decode(self, z: Tensor) -> Tensor:
        """Return colour logits (B, 10, S, S) for `z` (B, latent_dim)."""
        logits: Tensor = self.decoder(z.to(self.to_mu.weight.dtype))
        return logits.float()


def choose_weight_seed(config: TrainingConfig) -> int:
    """The seed of the random numbers that become the initial weights.

    It is far from those of the epochs. Generator 1 took the job's own seed: for seed 0 the numbers
    of the weights were those of the first epoch, too.
    """
    if config.generator == 1:
        return config.seed
    return int(np.random.SeedSequence([config.seed, _INITIAL_WEIGHTS]).generate_state(1)[0])
