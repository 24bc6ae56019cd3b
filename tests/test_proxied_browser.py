"""The dashboard in a real browser, below a path, behind a real nginx with TLS."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from nginx import NEEDS_NGINX, adapt, make_certificate, read_documented, running_nginx
from page_views import NEEDS_BROWSER, wait_for_epochs, wait_for_picture
from playwright.sync_api import Browser, expect
from service import Service
from test_events import find_free_port

pytest_plugins = ["browser_visits"]
pytestmark = [*NEEDS_NGINX, *NEEDS_BROWSER]

TOKEN = "a-long-and-secret-token"


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Where nginx serves a service with a worker."""
    service = Service(tmp_path / "experiments", token=TOKEN)
    service.start("server", "worker")
    port = find_free_port()
    certificate = make_certificate(tmp_path, names=["localhost"])
    block = adapt(
        read_documented("example.org"), port=port, upstream=service.port, certificate=certificate
    )
    with running_nginx(tmp_path, block, port=port):
        yield f"https://127.0.0.1:{port}/losslab/"
    for name in list(service.processes):
        service.stop(name)


def test_job_is_posted_and_followed_below_the_path(browser: Browser, address: str) -> None:
    context = browser.new_context(ignore_https_errors=True)
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.get_by_label("Token").fill(TOKEN)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("heading", name="No job yet")).to_be_visible()
    (cookie,) = context.cookies()
    assert (cookie["path"], cookie["secure"], cookie["httpOnly"]) == ("/losslab", True, True)
    page.get_by_label("Quick test").check()
    page.get_by_text("Other settings").click()
    page.get_by_label("num samples").fill("400")
    expect(page.locator("#preview")).to_contain_text("num samples400")
    page.get_by_role("button", name="Post the job").click()
    page.wait_for_url("**/losslab/ui/jobs/*")
    wait_for_epochs(page, 5)
    assert wait_for_picture(page)
    expect(page.locator("#state")).to_have_attribute("data-status", "succeeded")
    page.get_by_role("link", name="Compare", exact=True).first.click()
    page.goto(f"{address}docs")
    expect(page.locator(".opblock").first).to_be_visible()
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_label("Token")).to_be_visible()
    assert [url for url in asked if not url.startswith((address, "data:"))] == []
    assert any(re.search(r"/losslab/jobs/\w+/events", url) for url in asked)
    context.close()
