"""One step of training, plain and as PyTorch's compiler sees it."""

import logging
from functools import partial

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from server.models.configuration import TrainingConfig
from worker.atomic import generate_atomic
from worker.data import DeviceGrids
from worker.step import StepPath, TrainingStep, compute_batch

CPU = torch.device("cpu")
BATCH_SIZE, NUM_STEPS = 16, 6


def make_step(**config: object) -> TrainingStep:
    grids = DeviceGrids(generate_atomic(num_grids=BATCH_SIZE * NUM_STEPS, seed=0), device=CPU)
    return TrainingStep(
        TrainingConfig.model_validate({"batch_size": BATCH_SIZE, **config}),
        grids,
        class_weights=torch.linspace(0.5, 2.0, 10),
    )


def run(step: TrainingStep) -> list[float]:
    """The losses of an epoch."""
    order = step.begin_epoch(7)
    for position, indices in enumerate(order.split(BATCH_SIZE)):
        step.run(indices, position=position, beta=0.5, learning_rate=1e-3)
    losses: list[float] = step.losses.tolist()
    return losses


def trace(step: TrainingStep) -> None:
    """Let the step compute what the compiler would be given, in one piece or not at all."""
    traced = torch.compile(compute_batch, backend="aot_eager", dynamic=False, fullgraph=True)
    step._compute = partial(traced, step.model, **step.constants())


# PyTorch's compiler does what PyTorch warns of.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_options_share_what_is_compiled_and_have_the_losses_of_plain_steps() -> None:
    torch._dynamo.reset()
    counters.clear()
    for config in (
        {},
        {"seed": 1, "beta": 4.0},
        {"use_focal_loss": False},
        {"focal_gamma": 1.5, "free_bits": 0.1},
        {"augment": False},
    ):
        plain, traced = make_step(**config), make_step(**config)
        trace(traced)
        assert np.allclose(run(traced), run(plain), rtol=0.01), config
    assert counters["stats"]["unique_graphs"] == 1


def test_a_box_without_a_c_compiler_trains_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def find_no_compiler(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nSet it by CC.")

    torch._dynamo.reset()
    monkeypatch.setattr("worker.step.compiled", lambda _compute: find_no_compiler)
    step = make_step()
    with caplog.at_level(logging.WARNING, logger="worker"):
        step.compile()
    (message,) = caplog.messages
    assert message.endswith("is not compiled and runs slower: Failed to find C compiler.")
    assert step.path is StepPath.plain
    assert run(step) == run(make_step())


def test_steps_in_float32_have_the_losses_of_steps_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        monkeypatch.setattr("worker.step.choose_dtype", lambda _device, dtype=dtype: dtype)
        step = make_step()
        losses[dtype] = run(step)
        assert {parameter.dtype for parameter in step.model.parameters()} == {dtype}
        assert step.weights.master.dtype == torch.float32
    first, *_, last = losses[torch.float32]
    assert last < first
    assert np.allclose(losses[torch.float32], losses[torch.bfloat16], rtol=0.02)
