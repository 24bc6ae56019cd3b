"""The pages of studies in a real browser."""

import re
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from conftest import TINY
from page_views import HOSTILE, NEEDS_BROWSER, OpenPage, is_marked, mark, wait_until
from playwright.sync_api import Page, expect
from service import Service

from server.texts import show_controls

pytest_plugins = ["browser_visits"]
pytestmark = NEEDS_BROWSER

DESKTOP, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}
#: A word that no line can hold, and a name that runs from right to left.
LONG_ARM, BACKWARDS_ARM = "w" * 64, "\u202eb \u05e9\u05dc\u05d5\u05dd"


def wait_for_study(service: Service, page: Page, study_id: str) -> None:
    def has_ended() -> bool:
        study = page.request.get(f"{service.url}/studies/{study_id}").json()
        return bool(study["status"] == "succeeded")

    wait_until(has_ended)


def find_violations(page: Page) -> list[str]:
    """All that axe finds, in both colour schemes, also what it does not call serious."""
    found = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        answer = Axe().run(page, options={"resultTypes": ["violations"]})
        found += [f"{scheme} {each['id']}: {each['nodes'][0]['html']}"
                  for each in answer.response["violations"]]  # fmt: skip
    return found


@pytest.fixture(scope="module")
def study(service: Service) -> dict[str, Any]:
    """A study that has ended, with names that are hard to show."""
    arms: list[Any] = [
        "a",
        {"name": LONG_ARM, "base": "b", "config": {"free_bits": 0.1}},
        {"name": BACKWARDS_ARM, "base": "b"},
    ]
    made = service.post("/studies", name=HOSTILE, options=arms, num_seeds=2, config=TINY)
    return made


def test_study_is_planned_posted_and_followed_to_its_end(
    service: Service, open_page: OpenPage
) -> None:
    page = open_page("/ui/studies/new")
    preview = page.locator("#preview")
    expect(preview).to_contain_text("3 arms × 5 seeds = 15 jobs")
    page.get_by_label("c fallback").uncheck()
    expect(preview).to_contain_text("2 arms × 5 seeds = 10 jobs")
    page.get_by_label("Setting 1", exact=True).select_option("beta")
    page.get_by_label("Values of setting 1").fill("0.5, 1")
    expect(preview).to_contain_text("4 arms × 5 seeds = 20 jobs")
    page.get_by_label("number of seeds", exact=True).fill("0")
    expect(preview).to_contain_text("cannot be posted")
    page.get_by_label("number of seeds", exact=True).fill("1")
    page.get_by_role("spinbutton", name="epochs").fill("2")
    page.get_by_role("spinbutton", name="num samples").fill("200")
    page.get_by_role("textbox", name="Name").fill("from the form")
    expect(preview).to_contain_text("4 arms × 1 seed = 4 jobs")
    page.get_by_role("button", name="Post the study").click()
    page.wait_for_url(re.compile("/ui/studies/[0-9a-f]{12}$"))
    mark(page)
    expect(page.get_by_role("heading", name="from the form")).to_be_visible()
    expect(page.get_by_label(re.compile("^seed 0: "))).to_have_count(4)
    expect(page.locator("#state")).to_have_attribute("data-status", "succeeded")
    expect(page.locator("#decision")).to_contain_text("No arm passed once")
    expect(page.locator("#arms .seed-waiting, #arms .seed-running")).to_have_count(0)
    expect(page.locator("#curve-train_loss .chart")).to_have_attribute(
        "aria-label", re.compile(r"last medians: a beta=0\.5 \d")
    )
    expect(page.locator("body")).to_have_attribute("data-refresh-seconds", "")
    assert is_marked(page)
    page.get_by_label(re.compile("^seed 0: ")).first.click()
    page.get_by_role("link", name="from the form").click()
    expect(page.get_by_role("heading", name="from the form")).to_be_visible()


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE])
def test_pages_have_no_barrier_and_fit(
    service: Service, open_page: OpenPage, study: dict[str, Any], viewport: dict[str, int]
) -> None:
    paths = ["/ui/studies", f"/ui/studies/{study['id']}",
             "/ui/studies/new?epochs=0&grid_values_1=1"]  # fmt: skip
    for path in paths:
        page = open_page(path, viewport=viewport)
        wait_for_study(service, page, study["id"])
        page.reload()
        for details in page.locator("summary").all():
            details.click()
        assert find_violations(page) == [], path
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width == viewport["width"], path


def test_names_of_studies_and_arms_are_inert(
    service: Service, open_page: OpenPage, study: dict[str, Any]
) -> None:
    for path in ("/ui/studies", f"/ui/studies/{study['id']}"):
        page = open_page(path)
        expect(page.get_by_text(HOSTILE).first).to_be_visible()
        assert page.locator("[data-taken], img[src=x]").count() == 0
    # What follows a name that runs from right to left still runs from left to right.
    wait_for_study(service, page, study["id"])
    page.reload()
    sentence = page.locator("#decision .sentence")
    expect(sentence.locator("bdi")).to_have_text(show_controls(BACKWARDS_ARM))
    places = sentence.evaluate(
        """(element) => {
          const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
          for (let node = walker.nextNode(); node; node = walker.nextNode()) {
            const start = node.data.indexOf("passed 0 of");
            if (start < 0) continue;
            return [0, 7].map((offset) => {
              const range = document.createRange();
              range.setStart(node, start + offset);
              range.setEnd(node, start + offset + 1);
              return range.getBoundingClientRect().left;
            });
          }
        }"""
    )
    assert places[0] < places[1]


def test_keyboard_alone_reaches_every_seed_and_posts_a_study(
    service: Service, open_page: OpenPage, study: dict[str, Any]
) -> None:
    page = open_page(f"/ui/studies/{study['id']}")
    wait_for_study(service, page, study["id"])
    page.reload()
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "document.activeElement.ariaLabel || document.activeElement.textContent.trim()"
            )
        )
    seeds = [each for each in reached if each.startswith("seed ") and ": " in each]
    assert [each[:7] for each in seeds] == ["seed 0:", "seed 1:"] * 3
    assert {"Add seeds", "Report as HTML", "Delete this study"} <= set(reached)
    page = open_page("/ui/studies/new")
    page.get_by_label("b proposed").focus()
    page.keyboard.press("Space")
    expect(page.locator("#preview")).to_contain_text("2 arms")
    page.keyboard.press("Space")
    page.get_by_label("number of seeds", exact=True).focus()
    page.keyboard.type("1")
    page.get_by_role("spinbutton", name="num samples").focus()
    page.keyboard.type("200")
    page.get_by_role("spinbutton", name="epochs").focus()
    page.keyboard.type("1")
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("/ui/studies/[0-9a-f]{12}$"))
    page.get_by_role("button", name="cancel the study").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#state")).to_have_attribute(
        "data-status", re.compile("cancelled|succeeded")
    )


def test_pages_say_the_same_without_a_script(
    service: Service, open_page: OpenPage, study: dict[str, Any]
) -> None:
    page = open_page(f"/ui/studies/{study['id']}", java_script_enabled=False)
    wait_for_study(service, page, study["id"])
    page.reload()
    expect(page.locator("#decision .sentence")).to_contain_text("No arm passed once")
    chart = page.locator("#curve-val_foreground_iou .area").bounding_box()
    assert chart is not None
    assert chart["width"] > 300
    page.goto(f"{service.url}/ui/studies/new")
    page.get_by_label("a baseline").uncheck()
    page.get_by_role("button", name="Preview").click()
    expect(page.locator("#preview")).to_contain_text("2 arms × 5 seeds = 10 jobs")
    expect(page.get_by_label("a baseline")).not_to_be_checked()
