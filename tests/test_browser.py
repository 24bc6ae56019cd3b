"""The dashboard in a real browser: what a researcher sees and does."""

import re
from pathlib import Path
from typing import Any

import httpx
from long_histories import fill_database
from page_views import (
    HOSTILE,
    NEEDS_BROWSER,
    OpenPage,
    count_epochs,
    find_barriers,
    is_marked,
    mark,
    wait_for_epochs,
    wait_for_picture,
)
from playwright.sync_api import Page, Route, expect
from service import Service

TOKEN = "a-long-and-secret-token"
PHONE = {"width": 390, "height": 844}

pytest_plugins = ["browser_visits"]
pytestmark = NEEDS_BROWSER


def test_job_is_posted_from_the_form_and_grows_before_ones_eyes(
    own_service: Service, open_page: OpenPage
) -> None:
    own_service.start("worker")
    page = open_page("/", url=own_service.url)
    expect(page.get_by_role("heading", name="No job yet")).to_be_visible()
    page.get_by_label("Quick test").check()
    page.get_by_role("textbox", name="Name").fill("from the form")
    page.get_by_text("Other settings").click()
    page.get_by_label("num samples").fill("400")
    preview = page.locator("#preview")
    expect(preview.locator(".changed")).to_contain_text("num samples")
    expect(preview).to_contain_text("num samples400")
    page.get_by_label("c fallback").check()
    expect(preview).to_contain_text("inverse")
    page.get_by_role("button", name="Post the job").click()
    page.wait_for_url("**/ui/jobs/*")
    mark(page)
    expect(page.get_by_role("heading", name="from the form")).to_be_visible()
    for num_epochs in (1, 2, 4):
        wait_for_epochs(page, num_epochs)
        assert wait_for_picture(page)
    expect(page.locator("#state")).to_have_attribute("data-status", "succeeded")
    expect(page.locator("#state")).to_contain_text("epoch 5 of 5")
    wait_for_epochs(page, 5)
    expect(page.locator("#verdict")).to_contain_text("5 of 5 epochs ran")
    expect(page.locator("#events")).to_contain_text("all 5 epochs ran")
    expect(page.locator("#checkpoints tbody tr")).to_have_count(5)
    expect(page.locator("#log")).to_contain_text("[EPOCH 5/5]")
    assert {count_epochs(page, panel) for panel in ("accuracy", "kl", "schedule")} == {5}
    assert is_marked(page)


def test_preview_that_fails_comes_back_by_itself(open_page: OpenPage) -> None:
    page = open_page("/ui/jobs/new", away=True)
    page.route("**/ui/jobs/new?*", lambda route: route.abort(), times=1)
    page.get_by_label("c fallback").check()
    preview = page.locator("#preview")
    expect(preview).to_contain_text("does not send")
    expect(preview).to_contain_text("inverse")
    expect(preview).not_to_contain_text("does not send")
    expect(page.locator("#connection")).to_be_empty()


def test_preview_is_of_what_was_typed_last(open_page: OpenPage) -> None:
    page = open_page("/ui/jobs/new")
    held: list[Route] = []
    page.route("**/ui/jobs/new?*", lambda route: held.append(route), times=1)
    with page.expect_request("**/ui/jobs/new?*"):
        page.get_by_label("c fallback").check()
    page.get_by_label("a baseline").check()
    changed = page.locator("#preview")
    expect(changed).to_contain_text("class weightingnone")
    held[0].continue_()
    page.wait_for_timeout(500)
    expect(changed).to_contain_text("class weightingnone")


def test_marks_are_kept_from_page_to_page(own_service: Service, open_page: OpenPage) -> None:
    job_ids = fill_database(own_service.data_dir, num_jobs=60, num_epochs=1)
    page = open_page("/", url=own_service.url)
    box = page.locator("[name=job_id]")
    compare = page.locator("#compare-marked")
    expect(compare).to_be_disabled()
    box.first.check()
    page.get_by_role("link", name="Older jobs").click()
    expect(page.locator(f"#job-{job_ids[-26]}")).to_be_visible()
    box.first.check()
    page.get_by_role("link", name="Compare").click()
    expect(compare).to_contain_text("2 marked")
    page.get_by_role("link", name="Older jobs").click()
    box.last.check()
    compare.click()
    expect(page.get_by_role("heading", name="3 jobs compared")).to_be_visible()
    for job_id in (job_ids[-1], job_ids[-26], job_ids[0]):
        expect(page.locator(f"#row-{job_id}")).to_be_visible()
    page.get_by_role("link", name="Compare").click()
    expect(page.locator("[name=job_id]:checked")).to_have_count(2)
    page.get_by_role("button", name="Unmark all").click()
    expect(page.locator("[name=job_id]:checked")).to_have_count(0)
    expect(compare).to_be_disabled()


def test_more_marks_than_can_be_compared_are_told(
    own_service: Service, open_page: OpenPage
) -> None:
    fill_database(own_service.data_dir, num_jobs=101, num_epochs=1)
    page = open_page("/ui/compare", url=own_service.url)
    for num_marked in (50, 100, 101):
        for box in page.locator("[name=job_id]").all():
            box.check()
        expect(page.locator("#compare-marked")).to_contain_text(f"{num_marked} marked")
        if num_marked < 101:
            expect(page.locator("#compare-marked")).to_be_enabled()
            with page.expect_event("load"):
                page.get_by_role("link", name="Older jobs").click()
    expect(page.get_by_text("100 can be compared at once")).to_be_visible()
    expect(page.locator("#compare-marked")).to_be_disabled()


def test_list_follows_its_jobs_and_their_worker(open_page: OpenPage, service: Service) -> None:
    service.wait(service.train("a")["id"])
    page = open_page("/")
    expect(page.locator("#rows tr").first).to_be_visible()
    mark(page)
    job = service.train("a", name="seen to come")
    row = page.locator(f"#job-{job['id']}")
    expect(row).to_contain_text("seen to come")
    page.locator(f"#job-{job['id']} [type=checkbox]").check()
    expect(row).to_contain_text("succeeded")
    expect(row).to_contain_text("epoch 2 of 2")
    expect(row.locator("[type=checkbox]")).to_be_checked()
    expect(page.locator("#workers")).to_contain_text("heartbeat")
    assert is_marked(page)


def test_api_is_tried_on_its_own_page(open_page: OpenPage, service: Service) -> None:
    page = open_page("/docs")
    page.get_by_role("button", name="POST /jobs Create Job").click()
    page.get_by_role("button", name="Try it out").click()
    page.locator("textarea").fill('{"option": "a", "epochs": 1, "num_samples": 200}')
    page.get_by_role("button", name="Execute").click()
    answer = page.locator(".live-responses-table")
    expect(answer).to_contain_text("201")
    job_id = re.search(r'"id": "([0-9a-f]{12})"', answer.inner_text())
    assert job_id is not None
    service.wait(job_id[1])


def test_job_is_paused_resumed_and_cancelled_by_its_buttons(
    open_page: OpenPage, service: Service
) -> None:
    job = service.train("b", num_samples=2000, epochs=500)
    page = open_page(f"/ui/jobs/{job['id']}")
    state = page.locator("#state")
    wait_for_epochs(page, 1)
    page.get_by_role("button", name="Pause").click()
    expect(state).to_have_attribute("data-status", "paused")
    page.get_by_role("button", name="Resume").click()
    expect(state).to_have_attribute("data-status", "running")
    page.goto(f"{service.url}/?status=running")
    page.locator(f"#job-{job['id']}").get_by_role("button", name="Cancel").click()
    service.wait(job["id"], status="cancelled")
    assert page.url.endswith("/?status=running")
    expect(page.locator("#rows")).to_contain_text("No job matches")


def test_hostile_names_are_inert(open_page: OpenPage, trained: dict[str, dict[str, Any]]) -> None:
    job_id = trained["c"]["id"]
    for path in ("/", f"/ui/jobs/{job_id}", f"/ui/compare?job_id={job_id}", "/ui/compare"):
        page = open_page(path)
        expect(page.get_by_text(HOSTILE).first).to_be_visible()
        assert page.locator("img[src=x]").count() == 0
        assert page.locator("[data-taken]").count() == 0


def unfold(page: Page) -> None:
    for details in page.locator("summary").all():
        details.click()


def test_pages_have_no_serious_barrier(
    open_page: OpenPage, trained: dict[str, dict[str, Any]]
) -> None:
    ids = "&".join(f"job_id={job['id']}" for job in trained.values())
    paths = ["/", "/ui/jobs/new?epochs=0", "/ui/compare", f"/ui/compare?{ids}", "/ui/nowhere"]
    for path in [*paths, f"/ui/jobs/{trained['b']['id']}"]:
        page = open_page(path, away=path == "/ui/nowhere")
        page.wait_for_load_state("networkidle")
        unfold(page)
        assert find_barriers(page) == [], path


def test_pages_have_no_serious_barrier_before_and_while_a_job_runs(
    own_service: Service, open_page: OpenPage
) -> None:
    page = open_page("/", url=own_service.url)
    expect(page.get_by_role("heading", name="No job yet")).to_be_visible()
    unfold(page)
    assert find_barriers(page) == []
    job = own_service.train("b", num_samples=2000, epochs=500)
    page = open_page(f"/ui/jobs/{job['id']}", url=own_service.url)
    unfold(page)
    assert find_barriers(page) == []
    own_service.start("worker")
    wait_for_epochs(page, 1)
    wait_for_picture(page)
    assert find_barriers(page) == []
    expect(page.locator("#state")).to_have_attribute("data-status", "running")


def test_texts_can_be_read_while_the_next_picture_loads(
    open_page: OpenPage, trained: dict[str, dict[str, Any]]
) -> None:
    page = open_page(f"/ui/jobs/{trained['a']['id']}")
    wait_for_picture(page)
    page.evaluate("document.getElementById('samples').classList.add('outdated')")
    assert find_barriers(page) == []


def test_pages_fit_on_a_phone(open_page: OpenPage, trained: dict[str, dict[str, Any]]) -> None:
    ids = "&".join(f"job_id={job['id']}" for job in trained.values())
    for path in ("/", "/ui/jobs/new", f"/ui/compare?{ids}", f"/ui/jobs/{trained['a']['id']}"):
        page = open_page(path, viewport=PHONE)
        page.wait_for_load_state("networkidle")
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"], path


def test_option_with_a_long_name_is_chosen_on_a_phone(
    own_service: Service, open_page: OpenPage
) -> None:
    name = "b_" + "x" * 62
    body = {"base": "b", "config": {"free_bits": 0.1}, "summary": "b with free bits " * 20}
    httpx.put(f"{own_service.url}/options/{name}", json=body).raise_for_status()
    own_service.train("a")
    page = open_page("/ui/jobs/new", url=own_service.url, viewport=PHONE)
    page.get_by_label(name).check()
    expect(page.locator("#preview")).to_contain_text("free bits0.1")
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    page.get_by_role("button", name="Post the job").click()
    page.wait_for_url("**/ui/jobs/*")
    expect(page.get_by_role("heading", level=1)).to_contain_text(name)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    page.goto(own_service.url)
    expect(page.locator("#rows tr")).to_have_count(2)
    page.locator("select[name=option]").select_option(name)
    expect(page.locator("#rows tr")).to_have_count(1)
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]


def test_pages_say_the_same_without_a_script(
    open_page: OpenPage, trained: dict[str, dict[str, Any]]
) -> None:
    job_id = trained["b"]["id"]
    page = open_page("/", java_script_enabled=False)
    expect(page.locator(f"#job-{job_id}")).to_contain_text("succeeded")
    page.get_by_label("Status").select_option("failed")
    page.get_by_role("button", name="Show", exact=True).click()
    expect(page.locator("#rows")).to_contain_text("No job matches")
    page = open_page(f"/ui/jobs/{job_id}", java_script_enabled=False)
    expect(page.locator("#verdict .badge").first).to_be_visible()
    for part in (".slider", "#samples"):
        expect(page.locator(part)).to_be_hidden()
    expect(page.locator("[data-panel]:visible")).to_have_count(0)
    expect(page.get_by_alt_text("Curves of this job")).to_be_visible()
    picture = page.locator("#picture").bounding_box()
    assert picture is not None
    assert picture["height"] > 100


def test_times_are_the_readers_own(open_page: OpenPage, trained: dict[str, dict[str, Any]]) -> None:
    job = trained["a"]
    shown = {}
    for zone in ("UTC", "Asia/Kathmandu"):
        page = open_page(f"/ui/jobs/{job['id']}", timezone_id=zone)
        moment = page.locator("#state time").first
        shown[zone] = moment.inner_text()
        assert moment.get_attribute("datetime") == job["created_at"][:19] + "+00:00"
    minutes = {zone: [int(n) for n in text.split(":")[:2]] for zone, text in shown.items()}
    (hour, minute), (local_hour, local_minute) = minutes["UTC"], minutes["Asia/Kathmandu"]
    assert (60 * (local_hour - hour) + local_minute - minute) % (24 * 60) == 5 * 60 + 45


def test_keyboard_alone_reaches_everything(
    open_page: OpenPage, trained: dict[str, dict[str, Any]]
) -> None:
    page = open_page(f"/ui/jobs/{trained['a']['id']}")
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()")
        )
    assert {"Resume", "Compare", "epoch-slider", "log", "safetensors"} <= reached


def test_token_is_asked_for_once_and_opens_streams_and_buttons(
    open_page: OpenPage, tmp_path: Path
) -> None:
    service = Service(tmp_path, token=TOKEN)
    service.start("server")
    try:
        job = service.train("b")
        page = open_page(f"/ui/jobs/{job['id']}", url=service.url, away=True)
        expect(page.get_by_role("heading", name="Log in")).to_be_visible()
        assert find_barriers(page) == []
        page.get_by_label("Token").fill("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("not a token")
        page.get_by_label("Token").fill(TOKEN)
        with page.expect_response(re.compile("/events")) as stream:
            page.keyboard.press("Enter")
        assert stream.value.status == 200
        expect(page.get_by_role("heading", name=job["id"])).to_be_visible()
        (cookie,) = page.context.cookies()
        assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator("#state")).to_have_attribute("data-status", "cancelled")
        page.get_by_role("button", name="Log out").click()
        expect(page.get_by_role("heading", name="Log in")).to_be_visible()
    finally:
        service.stop("server")
