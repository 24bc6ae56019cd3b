"""What a page shows, asked of the browser."""

import time
from collections.abc import Callable

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Locator, Page

WAIT_MS = 60_000


def mark(page: Page) -> None:
    """What a reload would wipe out."""
    page.evaluate("window.wasNotReloaded = true")


def is_marked(page: Page) -> bool:
    return bool(page.evaluate("window.wasNotReloaded === true"))


def count_epochs(page: Page, panel: str = "loss") -> int:
    plot = page.locator(f"[data-panel={panel}] .plot")
    return int(plot.get_attribute("data-num-epochs") or 0)


def wait_until(condition: Callable[[], bool]) -> None:
    """Playwright's own wait_for_function compiles text, which the pages' policy forbids."""
    deadline = time.monotonic() + WAIT_MS / 1000
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_epochs(page: Page, num_epochs: int) -> None:
    wait_until(lambda: count_epochs(page) >= num_epochs)


def wait_for_picture(page: Page) -> str:
    """The picture's address, once it is really there."""
    wait_until(lambda: is_loaded(page.locator("#picture")))
    return page.locator("#picture").get_attribute("src") or ""


def is_loaded(image: Locator) -> bool:
    return bool(image.evaluate("image => image.complete && image.naturalWidth > 0"))


def find_barriers(page: Page) -> list[str]:
    violations = Axe().run(page).response["violations"]
    return [
        f"{violation['id']}: {node['html']}"
        for violation in violations
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]


def read_interactive_ms(page: Page) -> float:
    """When tables, curves and slider answered, counted from the click that asked for the page."""
    moments = page.evaluate("performance.getEntriesByName('interactive').map((m) => m.startTime)")
    (moment,) = moments
    return float(moment)
