"""Which tests run one after the other in one process, and which of these groups come first.

pytest-xdist gives a process the next group when it is nearly through with the last. The longest
ones come first, so that all processes have something to do until the end.
"""

from pathlib import PurePath

import pytest
from xdist.scheduler import LoadScopeScheduling

#: From the longest on; all others take a few seconds.
LONG_GROUPS = (
    "test_cli",
    "test_faults-postgresql",
    "test_browser",
    "test_job_page",
    "test_faults-sqlite",
    "test_outages",
    "test_contract",
    "test_training",
    "test_hostile_requests",
    "test_runner",
    "test_hostile_files",
    "test_competition-sqlite",
    "test_competition-postgresql",
    "test_comparison_page",
    "test_study_browser",
    "test_study_pages",
    "test_job_states-sqlite",
    "test_job_states-postgresql",
    "test_operations",
    "test_events",
    "test_retention",
    "test_security",
    "test_api",
    "test_migrations",
    "test_pages",
    "test_job_list",
)
#: Files whose fixtures take long for either database, and which are two groups therefore.
DIVIDED = ("test_faults", "test_competition", "test_job_states")


class GroupScheduling(LoadScopeScheduling):
    """Hands out the groups in the order in which they were collected."""

    def _split_scope(self, nodeid: str) -> str:
        return find_group(nodeid)


def find_group(nodeid: str) -> str:
    """A file, or what of it runs on one database."""
    path, _, name = nodeid.partition("::")
    stem = PurePath(path).stem
    if stem not in DIVIDED:
        return stem
    return f"{stem}-{'postgresql' if 'postgresql' in name else 'sqlite'}"


def sort_groups(items: list[pytest.Item]) -> None:
    places = {name: number for number, name in enumerate(LONG_GROUPS)}
    items.sort(key=lambda item: places.get(find_group(item.nodeid), len(places)))
