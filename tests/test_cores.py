"""How many cores and threads are used: what the environment and the control groups allow."""

import os
from pathlib import Path

import pytest
import torch

from server.environment.cores import THREAD_VARIABLES, count_cores, read_counts
from worker.device import take_share_of_cores

BATCH_VARIABLES = ("SLURM_CPUS_PER_TASK", "NSLOTS", "NCPUS", "LSB_DJOB_NUMPROC")
MANY = 64


@pytest.fixture(autouse=True)
def many_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has more cores than any quota here, and no batch system."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(MANY)))
    for name in (*BATCH_VARIABLES, *THREAD_VARIABLES):
        monkeypatch.delenv(name, raising=False)


def make_tree(root: Path, files: dict[str, str], *, groups: str = "0::/\n") -> Path:
    """A machine's `/sys/fs/cgroup` and the groups of this process."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


@pytest.mark.parametrize(
    ("quota", "num_cores"),
    [
        ("max 100000", MANY),
        ("50000 100000", 1),
        ("100000 100000", 1),
        ("250000 100000", 2),
        ("10000000 100000", MANY),
        ("nonsense", MANY),
        ("", MANY),
    ],
)
def test_quota_of_a_container_counts(tmp_path: Path, quota: str, num_cores: int) -> None:
    assert count_cores(root=make_tree(tmp_path, {"cpu.max": quota})) == num_cores


@pytest.mark.parametrize(
    ("quota", "period", "num_cores"),
    [("-1", "100000", MANY), ("50000", "100000", 1), ("300000", "100000", 3), ("", "", MANY)],
)
@pytest.mark.parametrize("folder", ["cpu", "cpu,cpuacct"])
def test_quota_of_the_first_version_counts(
    tmp_path: Path, folder: str, quota: str, period: str, num_cores: int
) -> None:
    files = {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": period}
    groups = f"4:memory:/docker/3f2a\n3:{folder}:/docker/3f2a\n1:name=systemd:/docker/3f2a\n"
    assert count_cores(root=make_tree(tmp_path, files, groups=groups)) == num_cores


@pytest.mark.parametrize("limited", ["user.slice", "user.slice/user-1000.slice", "user.slice/a/b"])
def test_quota_of_any_group_above_counts(tmp_path: Path, limited: str) -> None:
    deepest = "user.slice/user-1000.slice" if "user-1000" in limited else "user.slice/a/b"
    files = {f"{limited}/cpu.max": "300000 100000", f"{deepest}/other": ""}
    root = make_tree(tmp_path, files, groups=f"0::/{deepest}\n")
    assert count_cores(root=root) == 3


def test_nested_group_of_the_first_version_counts(tmp_path: Path) -> None:
    files = {
        "cpu,cpuacct/batch/cpu.cfs_quota_us": "200000",
        "cpu,cpuacct/batch/cpu.cfs_period_us": "100000",
        "cpu,cpuacct/batch/job/cpu.cfs_quota_us": "-1",
        "cpu,cpuacct/batch/job/cpu.cfs_period_us": "100000",
    }
    root = make_tree(tmp_path, files, groups="7:cpu,cpuacct:/batch/job\n0::/other\n")
    assert count_cores(root=root) == 2


def test_quota_of_another_group_does_not_count(tmp_path: Path) -> None:
    files = {"elsewhere/cpu.max": "100000 100000"}
    assert count_cores(root=make_tree(tmp_path, files, groups="0::/mine\n")) == MANY


def test_group_that_is_seen_from_within_a_namespace_is_no_way_out(tmp_path: Path) -> None:
    """A process outside of its namespace's root has `..` in its group."""
    (tmp_path / "machine/sys/fs").mkdir(parents=True)
    (tmp_path / "machine/cpu.max").write_text("100000 100000\n")
    root = make_tree(tmp_path / "machine", {}, groups="0::/../../..\n")
    assert count_cores(root=root) == MANY


def test_machine_without_control_groups_has_all_its_cores(tmp_path: Path) -> None:
    assert count_cores(root=tmp_path) == MANY


@pytest.mark.parametrize("variable", BATCH_VARIABLES)
def test_cores_of_a_batch_job_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "3")
    assert count_cores(root=tmp_path) == 3


@pytest.mark.parametrize(
    ("given", "counts"),
    [
        *[("1", [1]), (" 4 ", [4]), ("4,2", [4]), ("007", [7])],
        *[("0", []), ("-1", []), ("", []), ("x", []), ("2.5", []), ("9" * 30, [])],
    ],
)
def test_count_is_read_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, given: str, counts: list[int]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert read_counts(["OMP_NUM_THREADS"]) == counts


@pytest.mark.parametrize(
    ("variables", "num_workers", "num_threads"),
    [
        ({}, 1, 6),
        ({}, 4, 1),
        ({"OMP_NUM_THREADS": "1"}, 1, 1),
        ({"MKL_NUM_THREADS": "2"}, 1, 2),
        ({"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "3"}, 1, 3),
        ({"OMP_NUM_THREADS": "4"}, 3, 2),
        ({"OMP_THREAD_LIMIT": "2"}, 1, 2),
        ({"OMP_NUM_THREADS": "100"}, 1, 6),
    ],
)
def test_threads_are_at_most_what_the_environment_allows(
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    num_workers: int,
    num_threads: int,
) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    before = torch.get_num_threads()
    try:
        take_share_of_cores(num_workers=num_workers)
        assert torch.get_num_threads() == num_threads
    finally:
        torch.set_num_threads(before)
