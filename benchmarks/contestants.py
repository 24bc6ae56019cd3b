"""Several ways to train the same model on the same grids, compared by `benchmarks.training`.

The program runs one contestant: for each input line it trains one round, then prints the seconds
and the number of grids.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from server.models.configuration import NUM_COLOURS, TrainingConfig
from worker import convolution, data
from worker.atomic import generate_atomic
from worker.device import keep_freed_memory
from worker.losses import GridLoss, compute_class_weights, compute_loss
from worker.model import BetaVAE, VAEOutput
from worker.training import Trainer

BATCH_SIZE = 128
# Only a few, so that the time of validation, which the other contestants lack, is negligible.
NUM_HELD_OUT = 16
METRICS_EVERY = 10
#: Trains on all grids once and returns their number.
Round = Callable[[], int]


class PlainDataset(Dataset[Tensor]):
    """Grids, each rotated or transposed at random when it is read."""

    def __init__(self, grids: np.ndarray) -> None:
        self.grids = grids

    def __len__(self) -> int:
        return len(self.grids)

    def __getitem__(self, index: int) -> Tensor:
        grid = np.rot90(self.grids[index], np.random.randint(4))
        if np.random.rand() < 0.5:
            grid = grid.T
        return torch.from_numpy(grid.astype(np.int64))


def make_plain_model() -> BetaVAE:
    """Losslab's model with PyTorch's convolutions in PyTorch's default memory format."""
    model = BetaVAE(latent_dim=10)
    for layers in (model.encoder, model.decoder):
        for index, layer in enumerate(layers):
            for kind in (nn.Conv2d, nn.ConvTranspose2d):
                if isinstance(layer, kind):
                    layers[index] = kind(
                        layer.in_channels,
                        layer.out_channels,
                        layer.kernel_size,
                        stride=layer.stride,
                        padding=layer.padding,
                    )
    return model


def compute_plain_loss(output: VAEOutput, grids: Tensor, class_weights: Tensor) -> GridLoss:
    return compute_loss(
        output, grids=grids, class_weights=class_weights, focal_gamma=2.0, beta=1.0, free_bits=0.0
    )


def make_losslab(grids: np.ndarray, *, device: torch.device, keeps_memory: bool = True) -> Round:
    if keeps_memory:
        keep_freed_memory()
    train, held_out = grids[:-NUM_HELD_OUT], grids[-NUM_HELD_OUT:]
    config = TrainingConfig(epochs=1000, batch_size=BATCH_SIZE, class_weighting="sqrt_inverse")
    epochs = Trainer(config, data.Dataset(train, held_out, held_out), device=device).epochs()

    def run() -> int:
        next(epochs)
        return len(train) // BATCH_SIZE * BATCH_SIZE

    return run


def make_losslab_with_plain_convolutions(grids: np.ndarray, *, device: torch.device) -> Round:
    """Losslab without its own gradients of convolutions."""
    for own in (convolution.Conv2d, convolution.ConvTranspose2d):
        setattr(own, "forward", own.__mro__[1].forward)  # noqa: B010 - mypy forbids a plain assignment
    return make_losslab(grids, device=device)


def make_losslab_that_gives_memory_back(grids: np.ndarray, *, device: torch.device) -> Round:
    """Losslab without keeping freed memory for reuse."""
    return make_losslab(grids, device=device, keeps_memory=False)


def make_plain(grids: np.ndarray, *, device: torch.device) -> Round:
    """A plain PyTorch training loop."""
    grids = grids[:-NUM_HELD_OUT]
    loader = DataLoader(PlainDataset(grids), batch_size=BATCH_SIZE, shuffle=True, drop_last=True)
    model = make_plain_model().to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    class_weights = count_class_weights(grids).to(device)

    def run() -> int:
        total_loss = 0.0
        for step, batch in enumerate(loader):
            batch = batch.to(device)
            output = model(batch, noise=torch.randn(len(batch), 10, device=device))
            loss = compute_plain_loss(output, batch, class_weights).total.mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total_loss += loss.item()
            if step % METRICS_EVERY == 0:
                measure_recalls(output.logits, batch)
        return len(loader) * BATCH_SIZE

    return run


def measure_recalls(logits: Tensor, grids: Tensor) -> list[float]:
    hits = logits.argmax(1) == grids
    return [
        hits[grids == colour].float().mean().item()
        for colour in range(NUM_COLOURS)
        if (grids == colour).any()
    ]


def make_pythae(grids: np.ndarray, *, device: torch.device) -> Round:
    """pythae's BaseTrainer (Chadebec et al., 2022) with the same encoder, decoder and loss."""
    from pythae.data.datasets import DatasetOutput  # noqa: PLC0415 - only this function needs it
    from pythae.models import BaseAE, BaseAEConfig  # noqa: PLC0415
    from pythae.models.base.base_utils import ModelOutput  # noqa: PLC0415
    from pythae.trainers import BaseTrainer, BaseTrainerConfig  # noqa: PLC0415

    grids = grids[:-NUM_HELD_OUT]
    class_weights = count_class_weights(grids).to(device)

    class Samples(PlainDataset):
        def __getitem__(self, index: int) -> DatasetOutput:
            return DatasetOutput(data=super().__getitem__(index))

    class Model(BaseAE):
        def __init__(self) -> None:
            super().__init__(BaseAEConfig(input_dim=(16, 16), latent_dim=10))
            self.vae = make_plain_model()

        def forward(self, inputs: DatasetOutput, **_: object) -> ModelOutput:
            batch = inputs["data"]
            output = self.vae(batch, noise=torch.randn(len(batch), 10, device=batch.device))
            loss = compute_plain_loss(output, batch, class_weights).total.mean()
            return ModelOutput(loss=loss)

    trainer = BaseTrainer(
        Model(),
        train_dataset=Samples(grids),
        training_config=BaseTrainerConfig(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=1e-3,
            no_cuda=device.type == "cpu",
        ),
    )
    trainer.prepare_training()

    def run() -> int:
        trainer.train_step(epoch=1)
        return len(grids)

    return run


def count_class_weights(grids: np.ndarray) -> Tensor:
    counts = torch.from_numpy(np.bincount(grids.reshape(-1), minlength=NUM_COLOURS))
    return compute_class_weights(
        counts, weighting=TrainingConfig(class_weighting="sqrt_inverse").class_weighting
    )


CONTESTANTS: dict[str, Callable[..., Round]] = {
    "losslab": make_losslab,
    "plain": make_plain,
    "pythae": make_pythae,
    "plain_convolutions": make_losslab_with_plain_convolutions,
    "memory_given_back": make_losslab_that_gives_memory_back,
}


def main() -> None:
    name, device, num_threads, num_grids = sys.argv[1:]
    torch.set_num_threads(int(num_threads))
    # Output of libraries must not be mixed with the answers on stdout.
    answers, sys.stdout = sys.stdout, sys.stderr
    grids = generate_atomic(num_grids=int(num_grids) + NUM_HELD_OUT, seed=0)
    run = CONTESTANTS[name](grids, device=torch.device(device))
    started = time.perf_counter()
    run()  # warms up; on a GPU, also records the CUDA graphs
    print(json.dumps({"first_seconds": time.perf_counter() - started}), file=answers, flush=True)
    for _ in sys.stdin:
        started = time.perf_counter()
        seen = run()
        seconds = time.perf_counter() - started
        print(json.dumps({"grids": seen, "seconds": seconds}), file=answers, flush=True)


if __name__ == "__main__":
    main()
