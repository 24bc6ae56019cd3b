"""Load time of the dashboard's largest page: a comparison of 100 jobs with 500 epochs each.

Opens it in a real Chromium, each time in a new profile with an empty cache, and measures from the
start of the navigation until tables and curves are visible and the page is interactive. Prints a
table and writes `results/dashboard.json`. It takes about a minute on two cores:

    python -m benchmarks.dashboard
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

from benchmarks.machine import REPOSITORY, describe_machine, write_results

sys.path.insert(0, str(REPOSITORY / "tests"))
from browser_visits import CLOSED_NETWORK, find_chromium
from long_histories import fill_database
from page_views import read_interactive_ms
from service import Service

NUM_JOBS = 100
NUM_EPOCHS = 500
TARGET_SECONDS = 2.0
PACKAGES = ("losslab", "fastapi", "sqlmodel", "numpy", "playwright")
VIEWPORT = {"width": 1280, "height": 800}
READ_NAVIGATION = """(() => {
  const [page] = performance.getEntriesByType("navigation");
  return {
    first_byte: page.responseStart,
    last_byte: page.responseEnd,
    parsed: page.domInteractive,
    num_bytes: page.decodedBodySize,
  };
})()"""


def main() -> None:
    arguments = parse_arguments()
    machine = describe_machine(PACKAGES)
    with tempfile.TemporaryDirectory() as data_dir, sync_playwright() as playwright:
        job_ids = fill_database(Path(data_dir), num_jobs=NUM_JOBS, num_epochs=NUM_EPOCHS)
        service = Service(Path(data_dir))
        service.start("server")
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=CLOSED_NETWORK)
        chromium = browser.version
        query = "&".join(f"job_id={job_id}" for job_id in job_ids)
        url = f"{service.url}/ui/compare?{query}"
        try:
            visits = [visit(browser, url=url) for _ in range(arguments.rounds + 1)][1:]
        finally:
            browser.close()
            service.stop("server")
    medians = {name: round(statistics.median(v[name] for v in visits)) for name in visits[0]}
    print(format_table(medians))
    if not arguments.no_write:
        measured = {"chromium": chromium, "num_jobs": NUM_JOBS, "num_epochs": NUM_EPOCHS}
        seconds = [round(visit["interactive"] / 1e3, 3) for visit in visits]
        results = {"medians_ms": medians, "interactive_seconds": seconds}
        write_results("dashboard", machine | measured | results)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-write", action="store_true", help="print the table only")
    return parser.parse_args()


def visit(browser: Browser, *, url: str) -> dict[str, Any]:
    """Milliseconds since the start of the navigation, measured by the browser."""
    context = browser.new_context(viewport=VIEWPORT)
    page = context.new_page()
    page.goto(url)
    moments = page.evaluate(READ_NAVIGATION) | {"interactive": read_interactive_ms(page)}
    context.close()
    return dict(moments)


def format_table(medians: dict[str, int]) -> str:
    lines = ["| | measured | target |", "| --- | --- | --- |"]
    for name, value in medians.items():
        if name == "num_bytes":
            lines.append(f"| size of the page | {value / 1e6:.2f} MB | |")
        else:
            target = f"{TARGET_SECONDS:g} s" if name == "interactive" else ""
            lines.append(f"| {name.replace('_', ' ')} | {value / 1e3:.2f} s | {target} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
