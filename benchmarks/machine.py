"""The machine, versions and date of a measurement, for the result files."""

import json
import os
import platform
import re
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
RESULTS_DIR = Path(os.environ.get("RESULTS_DIR") or Path(__file__).parent / "results")


def describe_machine(packages: tuple[str, ...]) -> dict[str, Any]:
    return {
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": _processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
    }


def write_results(name: str, results: dict[str, Any]) -> None:
    RESULTS_DIR.mkdir(exist_ok=True)
    (RESULTS_DIR / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")


def show(table: str, *, name: str, page: Path) -> None:
    """Put a table between the marks of this name in a page."""
    marked = re.sub(
        rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
        rf"\g<1>\n{table}\n\n\g<2>",
        page.read_text(),
        flags=re.DOTALL,
    )
    page.write_text(marked)


def _processor_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
