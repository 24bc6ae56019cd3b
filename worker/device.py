"""The device that a worker trains on, and its share of it."""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from server.environment.cores import THREAD_VARIABLES, count_cores, read_counts

# glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 2**30

#: Held while something changes or needs what all jobs of this process share: the generators of
#: PyTorch, and the capture of a graph, which another one's work would break.
sharing_device: Final = threading.Lock()


def choose_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe_device(device: torch.device) -> str:
    """The device in words: `NVIDIA H100` or `cpu, 2 threads`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    num_threads = torch.get_num_threads()
    return f"cpu, {num_threads} thread{'s' if num_threads != 1 else ''}"


@contextmanager
def own_stream() -> Iterator[None]:
    """What this thread computes on a GPU runs beside what others compute.

    Made once per thread: PyTorch has 32 streams and hands them out again after the last.
    """
    if choose_device().type != "cuda":
        yield
        return
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        yield


def make_deterministic() -> None:
    """Let a GPU give the same numbers each time, so that a resumed job equals an uninterrupted one.

    cuBLAS reads its variable when it is first used.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def choose_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the processor computes in it, float32 elsewhere."""
    return torch.bfloat16 if device.type == "cuda" or _cpu_has_bf16() else torch.float32


def _cpu_has_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def take_share_of_cores(*, num_workers: int) -> None:
    """Use as many threads as this worker's share of the cores, which all workers here divide.

    The environment may allow fewer (OMP_NUM_THREADS, MKL_NUM_THREADS).
    """
    share = max(1, count_cores() // num_workers)
    torch.set_num_threads(min([share, *read_counts(THREAD_VARIABLES)]))


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees for its next step, up to a gigabyte.

    glibc returns large blocks to the kernel, and a step that allocates them again waits for each
    of their pages. Other C libraries are not changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
