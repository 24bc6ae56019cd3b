"""A real browser, and a service with jobs to show."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from page_views import HOSTILE, WAIT_MS, OpenPage
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from service import Service

CLOSED_NETWORK = [
    "--no-sandbox",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-sync",
    "--disable-domain-reliability",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]

expect.set_options(timeout=WAIT_MS)


def find_chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


# No longer than a module: until its end Playwright keeps an event loop, beside which no other runs.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = find_chromium()
    if executable is None:
        pytest.fail(
            "no Chromium is installed; install one (Debian's package is `chromium`), "
            "or set LOSSLAB_SKIP_BROWSER_TESTS=1 to leave the browser tests out"
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=CLOSED_NETWORK)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    service = Service(tmp_path_factory.mktemp("service"))
    service.start("server", "worker")
    yield service
    for name in list(service.processes):
        service.stop(name)


@pytest.fixture
def own_service(tmp_path: Path) -> Iterator[Service]:
    """A server without jobs; the test starts the worker when it needs one."""
    service = Service(tmp_path)
    service.start("server")
    yield service
    for name in list(service.processes):
        service.stop(name)


@pytest.fixture(scope="session")
def trained(service: Service) -> dict[str, dict[str, Any]]:
    """Finished jobs of options a, b and c, one with a hostile name."""
    names = {"a": "baseline", "b": "proposed", "c": HOSTILE}
    ids = {o: service.train(o, name=name, epochs=4)["id"] for o, name in names.items()}
    return {option: service.wait(job_id) for option, job_id in ids.items()}


@pytest.fixture
def open_page(browser: Browser, service: Service) -> Iterator[OpenPage]:
    """Open a page of the service; at the end no error may be in the console, and no request may
    have left this machine. `away`: the test stops the server meanwhile."""
    contexts: list[BrowserContext] = []
    errors: list[str] = []
    addresses: list[str] = []

    def open_one(path: str, *, url: str = service.url, away: bool = False, **options: Any) -> Page:
        context = browser.new_context(**{"locale": "en-GB"} | options)
        context.set_default_timeout(WAIT_MS)
        contexts.append(context)
        page = context.new_page()

        def note(text: str) -> None:
            if not (away and "Failed to load resource" in text):
                errors.append(text)

        page.on("console", lambda m: note(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: note(str(error)))
        page.on("dialog", lambda dialog: note(f"dialog: {dialog.message}"))
        page.on("request", lambda request: addresses.append(request.url))
        page.goto(f"{url}{path}")
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert errors == []
    assert {urlsplit(address).hostname for address in addresses} <= {"127.0.0.1", None}
