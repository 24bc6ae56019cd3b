"""What made the numbers of an attempt, as far as its worker knows."""

import platform
import re
import socket
from importlib.metadata import version
from pathlib import Path
from typing import Final

import numpy as np
import torch

from server.environment.source import read_source
from server.models.provenance import Provenance
from worker.device import choose_dtype, describe_device
from worker.training import Trainer

#: Where NVIDIA's driver for Linux says its version.
_DRIVER_PATH: Final = Path("/proc/driver/nvidia/version")


def describe_provenance(trainer: Trainer, *, worker_id: str) -> Provenance:
    """The provenance of what this trainer is about to do."""
    source, device = read_source(), trainer.device
    is_gpu = device.type == "cuda"
    return Provenance(
        losslab_version=version("losslab"),
        revision=source.revision,
        is_changed=source.is_changed,
        source_sha256=source.sha256,
        python_version=platform.python_version(),
        torch_version=torch.__version__,
        numpy_version=np.__version__,
        cuda_version=torch.version.cuda if is_gpu else None,
        driver_version=_read_driver_version() if is_gpu else None,
        device=describe_device(device),
        num_threads=None if is_gpu else torch.get_num_threads(),
        number_format=str(choose_dtype(device)).removeprefix("torch."),
        step_path=trainer.path,
        host=socket.gethostname(),
        worker_id=worker_id,
    )


def _read_driver_version() -> str | None:
    try:
        found = re.search(r"\d+\.\d+(\.\d+)*", _DRIVER_PATH.read_text())
    except OSError:
        return None
    return found.group() if found else None
