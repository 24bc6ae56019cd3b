"""How many cores this process may use: affinity, quotas of control groups, batch systems."""

import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

_ROOT: Final = Path("/")
#: What a batch system gave this job, by the names of Slurm, Grid Engine, PBS and LSF.
_BATCH_VARIABLES: Final = ("SLURM_CPUS_PER_TASK", "NSLOTS", "NCPUS", "LSB_DJOB_NUMPROC")
#: What the libraries below torch read, and torch's own setting would overrule.
THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "MKL_NUM_THREADS")


def count_cores(*, root: Path = _ROOT) -> int:
    """Cores that this process may use: at least one, also where a quota is less.

    `root` is the folder with `proc/` and `sys/`.
    """
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    limits = [*_read_quotas(root), *read_counts(_BATCH_VARIABLES)]
    return max(1, min([cores, *(math.floor(limit) for limit in limits)]))


def read_counts(names: Iterable[str]) -> list[int]:
    """The positive numbers in these variables; of a list such as `4,2` the first."""
    matches = (
        re.match(r"\s*0*([1-9][0-9]{0,5})\s*(,|$)", os.environ.get(name, "")) for name in names
    )
    return [int(match[1]) for match in matches if match]


def _read_quotas(root: Path) -> Iterator[float]:
    """The quotas of this process's control groups and of all groups above them, in cores."""
    mount = root / "sys/fs/cgroup"
    for folder in _list_folders(root, mount):
        yield from _read_quota_v2(folder)
        yield from _read_quota_v1(folder)


def _list_folders(root: Path, mount: Path) -> Iterator[Path]:
    """The folders that may hold a quota of this process.

    Each line of /proc/self/cgroup has a hierarchy's number, its controllers and the group; version
    2 has no controllers. A container may see its own group as the root.
    """
    yield from (mount, mount / "cpu", mount / "cpu,cpuacct")
    for line in _read_text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        parts = [part for part in group.split("/") if part not in ("", "..")]
        for top in {mount / controllers, mount / "cpu"} if controllers else {mount}:
            yield from (top.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1))


def _read_quota_v2(folder: Path) -> Iterator[float]:
    """`MICROSECONDS PERIOD`, or `max PERIOD`."""
    words = _read_text(folder / "cpu.max").split()
    if len(words) == 2 and words[0].isdigit():
        yield int(words[0]) / max(1, int(words[1]))


def _read_quota_v1(folder: Path) -> Iterator[float]:
    """Two files; a quota of -1 is none."""
    quota = _read_text(folder / "cpu.cfs_quota_us").strip()
    period = _read_text(folder / "cpu.cfs_period_us").strip()
    if quota.isdigit() and period.isdigit():
        yield int(quota) / max(1, int(period))


def _read_text(path: Path) -> str:
    """The file, or an empty text if there is none that can be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
