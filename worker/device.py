"""Which processor a worker trains on, and how much of it is its own."""

import torch

from server.settings import count_cores


def choose_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe_device(device: torch.device) -> str:
    """The device in words: `NVIDIA H100` or `cpu, 2 threads`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def take_share_of_cores(*, num_workers: int) -> None:
    """Use this worker's share of the cores that its machine's workers may use together."""
    torch.set_num_threads(max(1, count_cores() // num_workers))


def warm_up() -> None:
    """Make the first job of this process begin as quickly as the later ones.

    The first optimizer imports torch's compiler, which takes a second.
    """
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])
