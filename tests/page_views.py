"""What a page shows, read from the browser.

LOSSLAB_SKIP_BROWSER_TESTS=1 skips its tests on machines without Chromium.
"""

import os
import re
import time
from collections.abc import Callable
from typing import Any, Literal

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Locator, Page

WAIT_MS = 60_000
HOSTILE = "<img src=x onerror=document.body.dataset.taken=1></script><script>alert(1)</script>"

NEEDS_BROWSER = [
    pytest.mark.browser,
    pytest.mark.skipif(
        bool(os.environ.get("LOSSLAB_SKIP_BROWSER_TESTS")),
        reason="LOSSLAB_SKIP_BROWSER_TESTS asks to leave the browser tests out",
    ),
]

#: By colour scheme.
AXE_OPTIONS: dict[Literal["light", "dark"], dict[str, Any]] = {
    "light": {"resultTypes": ["violations"]},
    "dark": {"resultTypes": ["violations"], "runOnly": ["color-contrast"]},
}

OpenPage = Callable[..., Page]


def mark(page: Page) -> None:
    """State that a reload would reset."""
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


def count_pixels(page: Page, panel: str, colour: str) -> int:
    """How much of a panel is drawn in a colour of the style sheet, just as it stands there."""
    counted = page.evaluate(
        """([panel, name]) => {
          const canvas = document.querySelector(`[data-panel=${panel}] canvas`);
          const { width, height } = canvas;
          const copy = new OffscreenCanvas(width, height + 1);
          const context = copy.getContext("2d", { willReadFrequently: true });
          context.drawImage(canvas, 0, 0);
          context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(name);
          context.fillRect(0, height, 1, 1);
          const wanted = context.getImageData(0, height, 1, 1).data;
          const { data } = context.getImageData(0, 0, width, height);
          let count = 0;
          for (let i = 0; i < data.length; i += 4) {
            count += wanted.every((value, channel) => Math.abs(data[i + channel] - value) < 4);
          }
          return count;
        }""",
        [panel, colour],
    )
    return int(counted)


def list_loaded_pictures(page: Page) -> set[int]:
    """The epochs whose pictures the page has requested."""
    urls = page.evaluate("performance.getEntriesByType('resource').map(({ name }) => name)")
    found = (re.search(r"/reconstructions/(\d+)\.png", url) for url in urls)
    return {int(match[1]) for match in found if match}


def wait_for_picture(page: Page) -> str:
    """The picture's URL, once it has loaded."""
    wait_until(lambda: is_loaded(page.locator("#picture")))
    return page.locator("#picture").get_attribute("src") or ""


def is_loaded(image: Locator) -> bool:
    return bool(image.evaluate("image => image.complete && image.naturalWidth > 0"))


def find_barriers(page: Page) -> list[str]:
    """What axe calls serious or critical, in both colour schemes: only contrasts can differ."""
    found = []
    for scheme, options in AXE_OPTIONS.items():
        page.emulate_media(color_scheme=scheme)
        found += Axe().run(page, options=options).response["violations"]
    return [
        f"{violation['id']}: {node['html']}"
        for violation in found
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]


def read_interactive_ms(page: Page) -> float:
    """When tables, curves and slider answered, counted from the click that asked for the page."""
    marks = "performance.getEntriesByName('interactive').map((mark) => mark.startTime)"
    wait_until(lambda: bool(page.evaluate(marks)))
    (moment,) = page.evaluate(marks)
    return float(moment)
