"""Slots: several jobs at the same time in one process, which share its device.

A GPU has time left beside one job of this size: the host can hardly launch its steps fast enough.
Each slot is a thread that claims and runs one job at a time, and a worker of its own for everybody
else, with its own row, leases and heartbeats. So cancel, pause, a lost lease and a failure concern
one job alone. Each job has the numbers that it has alone, to the last bit.
"""

import logging
import threading
from collections.abc import Callable

import torch

from server.environment.cores import count_cores
from server.settings import Settings
from worker.device import choose_device, own_stream

#: Eight jobs of this size fill a GPU; more are no faster in all.
_NUM_ON_GPU = 8
#: A further job beside others is claimed only if so much memory is free: what a large job takes.
_NEEDED_BYTES = 2**30

_logger = logging.getLogger(__name__)


def choose_num_slots(settings: Settings) -> int:
    """The number that was set; else one on a CPU, whose cores one job uses, and eight on a GPU, or
    one per core if there are fewer."""
    if settings.jobs_per_worker is not None:
        return settings.jobs_per_worker
    return min(_NUM_ON_GPU, count_cores()) if choose_device().type == "cuda" else 1


class Slots:
    """The slots of this process. All of them end when `shutdown` is set."""

    def __init__(self, num: int, *, shutdown: threading.Event) -> None:
        self._num = num  # that still work
        self._shutdown = shutdown
        self._changing = threading.Lock()
        self._given_up: set[int] = set()  # threads
        self._errors: list[BaseException] = []

    def run(self, work: Callable[[], None]) -> None:
        """Call `work` in each slot, and return when all have ended. An error in one hands back the
        jobs of all, and is raised then."""
        if self._num == 1:
            work()
            return
        threads = [
            threading.Thread(target=self._run_one, args=(work,), name=f"slot {number}")
            for number in range(1, self._num + 1)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def give_up_one(self) -> bool:
        """Let the caller's slot end if there is another one; returns whether it should."""
        with self._changing:
            if self._num == 1:
                return False
            self._num -= 1
            self._given_up.add(threading.get_ident())
            _logger.warning("out of memory: from now on at most %d jobs at a time", self._num)
            return True

    def find_obstacle(self) -> str | None:
        """Until when no further job fits beside those that run; None if one does."""
        if self._num == 1 or choose_device().type != "cuda":
            return None
        free_bytes, _ = torch.cuda.mem_get_info()
        kept_bytes = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        if torch.cuda.memory_allocated() == 0 or free_bytes + kept_bytes >= _NEEDED_BYTES:
            return None
        return f"until {_NEEDED_BYTES // 2**20} MiB of the GPU's memory are free"

    def _run_one(self, work: Callable[[], None]) -> None:
        try:
            with own_stream():
                work()
        except BaseException as error:
            self._errors.append(error)
            self._shutdown.set()
        finally:
            # Nobody else takes over what the last slot that works would give up.
            with self._changing:
                self._num -= threading.get_ident() not in self._given_up
