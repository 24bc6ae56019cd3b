"""Capturing work on a GPU as one CUDA graph, and compiling it.

A step has some 300 kernels, each of which takes longer to launch than to run. The compiler joins
them to fewer.
"""

import logging
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worker.device import sharing_device

_NUM_WARM_UPS = 3
_own = threading.local()

_logger = logging.getLogger(__name__)


class StepInputs:
    """What differs from step to step, at fixed addresses: a graph reads them, and the host fills
    them without waiting for the device.

    `indices` (B,) of the step's grids, `position` (1,) of the step in its epoch, `beta` ().
    """

    def __init__(self, *, batch_size: int, device: torch.device) -> None:
        self.indices = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.beta = torch.zeros((), device=device)

    def fill(self, indices: Tensor, *, position: int, beta: float) -> None:
        self.indices.copy_(indices)
        self.position.fill_(position)
        self.beta.fill_(beta)


@cache
def compiled(compute: Callable[..., Any]) -> Callable[..., Any]:
    """One for all jobs of this process, so that only the first one waits for the compiler."""
    return torch.compile(compute, dynamic=False, fullgraph=True)


def keep_compiled(folder: Path) -> None:
    """Keep in `folder` what the compiler makes, for this process and later ones."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))


def capture(
    work: Callable[[], None],
    *,
    name: str,
    generator: torch.Generator,
    warming_up: AbstractContextManager[None] | None = None,
) -> Callable[[], None] | None:
    """The replay of a graph that does what `work` does; None, with the reason in the log, if it
    cannot be captured.

    `warming_up` undoes what the warm-up does, in place; capturing itself runs nothing. `work`
    has neither arguments nor a result: all that it reads and writes keeps its address.
    """
    try:
        # Gradients have one thread per device: another job's warm-up would run into the recording.
        with sharing_device:
            with warming_up or nullcontext():
                _warm_up(work)
            return _record(work, generator=generator).replay
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        # An error inside a recording makes its end fail too, which hides the first error.
        reason = str(error.__context__ or error).partition("\n")[0]
        _logger.warning("the %s is not captured as a graph and runs slower: %s", name, reason)
        return None


def _warm_up(work: Callable[[], None]) -> None:
    """Let libraries choose their kernels and allocate, which a graph cannot hold."""
    if not torch.cuda.is_available():
        work()
        return
    stream = _side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(_NUM_WARM_UPS):
                work()
    finally:
        # Also after an error: work that has begun must end before it is undone.
        torch.cuda.current_stream().wait_stream(stream)


def _record(work: Callable[[], None], *, generator: torch.Generator) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    # At each replay the graph takes its random numbers from the generator's position.
    graph.register_generator_state(generator)
    stream = torch.cuda.current_stream()
    try:
        # Other threads go on with their own work on the device meanwhile.
        with torch.cuda.graph(graph, stream=_side_stream(), capture_error_mode="thread_local"):
            work()
    finally:
        # A recording that fails leaves its own stream behind.
        torch.cuda.set_stream(stream)
    return graph


def _side_stream() -> torch.cuda.Stream:
    """One stream for all warm-ups and recordings of a thread: libraries keep some memory for each
    stream that they saw, and a stream that another thread records can do nothing else."""
    if not hasattr(_own, "side_stream"):
        _own.side_stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream: torch.cuda.Stream = _own.side_stream
    return stream
