"""Whether several models of the same shape train faster as one batched model than separately.

Measures one step (forward, backward, Adam) of three models: one after the other as Losslab trains
them, and stacked by `torch.func` with `vmap`, which turns convolutions into grouped ones. Both run
without the noise of z, on the same batches, alternately, and on a GPU each as one CUDA graph.
Prints a table and writes `results/many.json`:

    python -m benchmarks.many
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from benchmarks.contestants import BATCH_SIZE, compute_plain_loss, make_plain_model
from benchmarks.machine import describe_machine, write_results
from server.environment.cores import count_cores
from worker.atomic import generate_atomic
from worker.capture import capture
from worker.device import autocast, choose_device, keep_freed_memory
from worker.losses import GridLoss
from worker.model import BetaVAE, VAEOutput
from worker.optimizer import Adam

#: The speed-up that would justify the complexity.
TARGET_RATIO = 2.0
PACKAGES = ("losslab", "torch")

Step = Callable[[], None]


def main() -> None:
    arguments = parse_arguments()
    machine = describe_machine(PACKAGES)
    keep_freed_memory()
    torch.set_num_threads(count_cores())
    device = choose_device()
    grids = torch.from_numpy(generate_atomic(num_grids=arguments.models * BATCH_SIZE, seed=0))
    batches = grids.view(arguments.models, BATCH_SIZE, 16, 16).to(device)
    apart = record(make_apart(batches), name="step apart", device=device)
    together = record(make_together(batches), name="step together", device=device)
    seconds: dict[str, list[float]] = {"apart": [], "together": []}
    for number in range(arguments.rounds + 1):
        for name, step in (("apart", apart), ("together", together)):
            elapsed = measure(step, device=device, repeats=arguments.steps)
            if number:  # the first round warms up
                seconds[name].append(elapsed)
    ratio = statistics.median(
        a / t for a, t in zip(seconds["apart"], seconds["together"], strict=True)
    )
    medians = {name: round(statistics.median(found) * 1e3, 3) for name, found in seconds.items()}
    print(f"{device.type}, {arguments.models} models, ms per step of all models: {medians}")
    print(f"together is {ratio:.2f}x as fast; the target is {TARGET_RATIO:g}x")
    if not arguments.no_write:
        results = {
            "device": device.type,
            "models": arguments.models,
            "median_ms": medians,
            "together_times_as_fast": round(ratio, 2),
        }
        write_results("many", machine | results)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-write", action="store_true", help="print the table only")
    return parser.parse_args()


def measure(step: Step, *, device: torch.device, repeats: int) -> float:
    """Seconds per step."""
    started = time.perf_counter()
    for _ in range(repeats):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


def record(step: Step, *, name: str, device: torch.device) -> Step:
    """The step; on a GPU, recorded as a CUDA graph like Losslab's own steps."""
    if device.type != "cuda":
        return step
    return capture(step, name=name, generator=torch.Generator(device)) or step


def make_apart(batches: Tensor) -> Step:
    models = [BetaVAE(latent_dim=10).eval().to(batches.device) for _ in batches]
    for model in models:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizers = [make_adam(model.parameters(), device=batches.device) for model in models]

    def step() -> None:
        for model, optimizer, grids in zip(models, optimizers, batches, strict=True):
            with autocast(grids.device):
                output = model(grids)
            optimizer.zero_grad()
            compute_loss(output, grids).total.mean().backward()
            optimizer.step()

    return step


def make_together(batches: Tensor) -> Step:
    models: list[nn.Module] = [make_plain_model().eval().to(batches.device) for _ in batches]
    for model in models:
        for layer in model.modules():
            if isinstance(layer, nn.ReLU):
                layer.inplace = False
    parameters, buffers = stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")
    optimizer = make_adam(parameters.values(), device=batches.device)

    def forward(own: Any, constants: Any, grids: Tensor) -> VAEOutput:
        output: VAEOutput = functional_call(skeleton, (own, constants), (grids,))
        return output

    def step() -> None:
        with autocast(batches.device):
            outputs = torch.vmap(forward)(parameters, buffers, batches)
        flat = VAEOutput(*(tensor.flatten(0, 1) for tensor in outputs))
        optimizer.zero_grad()
        # The sum of the models' mean losses, so that each model gets its own gradient unscaled.
        losses = compute_loss(flat, batches.flatten(0, 1)).total
        (losses.mean() * len(batches)).backward()
        optimizer.step()

    return step


def make_adam(parameters: Iterable[Tensor], *, device: torch.device) -> Adam:
    return Adam(parameters, learning_rate=0.001, device=device)


def compute_loss(output: VAEOutput, grids: Tensor) -> GridLoss:
    return compute_plain_loss(output, grids, torch.ones(10, device=grids.device))


if __name__ == "__main__":
    main()
