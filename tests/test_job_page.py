"""The page of a job in a real browser: live curves and the picture viewer."""

import re
import signal
from typing import Any

import httpx
import numpy as np
import pytest
from long_histories import BACKGROUND_SHARE, fill_database
from page_views import (
    NEEDS_BROWSER,
    OpenPage,
    count_epochs,
    count_pixels,
    is_marked,
    list_loaded_pictures,
    mark,
    wait_for_epochs,
    wait_for_picture,
    wait_until,
)
from playwright.sync_api import expect
from service import Service
from sqlalchemy import func, select, update

from server.database.engine import open_database
from server.models.epochs import EpochMetrics
from server.settings import Settings

pytest_plugins = ["browser_visits"]
pytestmark = NEEDS_BROWSER

WHOLE_PAGE = {"width": 1280, "height": 4000}
READ_WAITING = (
    """getComputedStyle(document.querySelector("[data-panel=loss] .plot"), "::after").content"""
)
COUNT_WRONG_AT_TRUE_SHARE = """items => items.map((item) => {
  const [input, , matched] = [...item.querySelectorAll("canvas")].map((canvas) =>
    new Uint32Array(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height)
      .data.buffer));
  return input.filter((colour, index) => colour !== matched[index]).length;
})"""
#: All layout shifts since the page was requested: how far each went, and what moved.
READ_SHIFTS = """new Promise((resolve) => {
  const shifts = [];
  const tell = ({ node, previousRect, currentRect }) =>
    `${node?.id || node?.className || node?.nodeName} ${previousRect.y} to ${currentRect.y}`;
  new PerformanceObserver((list) => {
    for (const entry of list.getEntries()) shifts.push([entry.value, entry.sources.map(tell)]);
  }).observe({ type: "layout-shift", buffered: true });
  setTimeout(() => resolve(shifts), 500);
})"""


def shows_epoch(epoch: int) -> re.Pattern[str]:
    """The URL of that epoch's picture, with its hash if the page has it."""
    return re.compile(rf"/{epoch}\.png(\?sha256=[0-9a-f]{{64}})?$")


def test_page_outlives_a_restart_of_the_server_in_mid_run(
    open_page: OpenPage, service: Service
) -> None:
    job = service.train("b", num_samples=400, epochs=15, checkpoint_every=5)
    page = open_page(f"/ui/jobs/{job['id']}", away=True)
    mark(page)
    wait_for_epochs(page, 2)
    service.stop("server", signal.SIGKILL)
    expect(page.locator("#connection")).to_contain_text("does not answer")
    service.start("server")
    expect(page.locator("#connection")).to_be_empty()
    expect(page.locator("#state")).to_have_attribute("data-status", "succeeded")
    wait_for_epochs(page, 15)
    label = page.locator("[data-panel=loss] .plot").get_attribute("aria-label") or ""
    assert "epoch 1 to 15" in label
    assert count_epochs(page) == 15
    assert is_marked(page)


def test_page_of_a_job_that_waits_follows_it_without_a_jump(
    own_service: Service, open_page: OpenPage
) -> None:
    job = own_service.train("a", num_samples=400, epochs=6)
    page = open_page(f"/ui/jobs/{job['id']}", url=own_service.url, viewport=WHOLE_PAGE)
    expect(page.locator("#picture-note")).to_contain_text("after epoch")
    own_service.start("worker")
    wait_for_epochs(page, 1)
    assert page.evaluate(READ_WAITING) == "none"
    wait_for_picture(page)
    expect(page.locator("#picture-note")).to_be_empty()
    expect(page.locator("#state")).to_have_attribute("data-status", "succeeded")
    wait_for_epochs(page, 6)
    shifts = page.evaluate(READ_SHIFTS)
    assert sum(value for value, _ in shifts) < 0.02, shifts


def test_panels_tell_that_there_is_no_epoch_yet(own_service: Service, open_page: OpenPage) -> None:
    job = own_service.train("a")
    page = open_page(f"/ui/jobs/{job['id']}", url=own_service.url)
    assert "waits for a worker" in page.evaluate(READ_WAITING)
    own_service.post(f"/jobs/{job['id']}/cancel")
    expect(page.locator("#state")).to_have_attribute("data-status", "cancelled")
    assert "No epoch has ended" in page.evaluate(READ_WAITING)


def test_page_opened_before_the_first_epoch_draws_as_one_opened_after_the_last(
    own_service: Service, open_page: OpenPage
) -> None:
    job = own_service.train("b", epochs=60)
    url, path = own_service.url, f"/ui/jobs/{job['id']}"
    before = open_page(path, url=url)
    own_service.start("worker")
    wait_for_epochs(before, 60)
    share = own_service.wait(job["id"])["dataset_summary"]["background_share"]
    after = open_page(path, url=url)
    for page in (before, after):
        accuracy = page.locator("[data-panel=accuracy]")
        expect(accuracy).to_have_attribute("data-lines", str(share))
        page.mouse.move(0, 0)
    for panel, colour in (("loss", "--curve-0"), ("loss", "--curve-2"), ("accuracy", "--text")):
        drawn = count_pixels(after, panel, colour)
        assert drawn > 0
        assert count_pixels(before, panel, colour) == pytest.approx(drawn, rel=0.05)
    before.emulate_media(color_scheme="dark")
    plots = before.locator("[data-panel] .plot")
    assert plots.evaluate_all("all => all.map((plot) => plot.children.length)") == [1] * 8


def test_what_the_targets_mean_is_drawn(own_service: Service, open_page: OpenPage) -> None:
    (job_id,) = fill_database(own_service.data_dir, num_jobs=1, num_epochs=5)
    weak = [0.01, 0.05, 0.051, 0.5] + [2.0] * 6
    collapse_last_epoch(own_service, val_kl_per_dimension=weak)
    page = open_page(f"/ui/jobs/{job_id}", url=own_service.url)
    accuracy, foreground = (page.locator(f"[data-panel={p}]") for p in ("accuracy", "foreground"))
    expect(accuracy).to_have_attribute("data-band", "0.7 0.85")
    expect(accuracy).to_have_attribute("data-lines", str(BACKGROUND_SHARE))
    expect(foreground).to_have_attribute("data-lines", "0.3")
    assert count_pixels(page, "accuracy", "--band") > 1000
    assert count_pixels(page, "foreground", "--band") == 0
    for panel in ("accuracy", "foreground"):
        assert count_pixels(page, panel, "--text") > 100
    assert count_pixels(page, "loss", "--text") == 0
    expect(page.locator("[data-panel=kl]")).to_have_attribute("data-num-collapsed", "2")
    collapsed = count_pixels(page, "kl", "--heat-dead")
    alive = sum(count_pixels(page, "kl", f"--heat-{shade}") for shade in range(7))
    assert collapsed / (collapsed + alive) == pytest.approx(2 / 50, rel=0.2)
    assert count_pixels(page, "kl", "--heat-5") == pytest.approx(3 * collapsed, rel=0.2)


def collapse_last_epoch(service: Service, **values: Any) -> None:
    engine = open_database(Settings(data_dir=service.data_dir))
    newest = select(func.max(EpochMetrics.epoch)).scalar_subquery()
    with engine.begin() as connection:
        connection.execute(update(EpochMetrics).where(EpochMetrics.epoch == newest).values(values))
    engine.dispose()


def test_neighbouring_pictures_are_preloaded(
    open_page: OpenPage, trained: dict[str, dict[str, Any]]
) -> None:
    page = open_page(f"/ui/jobs/{trained['b']['id']}")
    wait_until(lambda: list_loaded_pictures(page) == {3, 4})
    page.locator("#epoch-slider").press("ArrowLeft")
    wait_until(lambda: list_loaded_pictures(page) == {2, 3, 4})
    expect(page.locator("#epoch-shown")).to_contain_text("epoch 3")


def test_picture_that_fails_to_load_is_reported_and_requested_again(
    open_page: OpenPage, trained: dict[str, dict[str, Any]]
) -> None:
    page = open_page(f"/ui/jobs/{trained['b']['id']}", away=True)
    samples, note = page.locator("#samples"), page.locator("#picture-note")
    wait_for_picture(page)
    page.wait_for_load_state("networkidle")
    page.route("**/reconstructions/*", lambda route: route.abort())
    page.locator("#epoch-slider").press("Home")
    expect(note).to_contain_text("epoch 1 could not be loaded")
    widths = "all => [...new Set(all.map((canvas) => canvas.width))]"
    assert samples.locator("canvas").evaluate_all(widths) == [1]
    assert samples.inner_text().strip().endswith("error")
    page.unroute("**/reconstructions/*")
    page.evaluate("Losslab.refresh()")
    expect(note).to_be_empty()
    assert samples.locator("canvas").evaluate_all(widths) != [1]
    expect(page.locator("#epoch-shown")).to_contain_text("epoch 1")


@pytest.mark.parametrize("side", [8, 16, 28])
def test_error_pictures_show_the_cells_that_are_wrong(
    open_page: OpenPage, service: Service, side: int
) -> None:
    grids = np.random.default_rng(side).integers(0, 10, (200, side, side))
    service.datasets_dir.mkdir(exist_ok=True)
    np.savez(service.datasets_dir / f"noise_{side}.npz", images=grids.astype(np.uint8))
    job = service.train("c", dataset=f"noise_{side}", epochs=1)
    service.wait(job["id"])
    page = open_page(f"/ui/jobs/{job['id']}")
    samples = page.locator("#samples li")
    expect(samples).to_have_count(10)
    expect(samples.last).to_have_attribute("data-num-cells", str(side**2))
    pictures = httpx.get(f"{service.url}/jobs/{job['id']}/reconstructions").json()["data"]
    shown = samples.evaluate_all("items => items.map((item) => Number(item.dataset.numWrong))")
    accuracies = [sample["pixel_accuracy"] for sample in pictures[-1]["samples"]]
    assert shown == [round(side**2 * (1 - accuracy)) for accuracy in accuracies]
    matched = [sample["matched_accuracy"] for sample in pictures[-1]["samples"]]
    num_wrong = samples.evaluate_all(COUNT_WRONG_AT_TRUE_SHARE)
    assert num_wrong == [round(side**2 * (1 - accuracy)) for accuracy in matched]


def test_many_dimensions_are_one_map(open_page: OpenPage, service: Service) -> None:
    job = service.train("b", latent_dim=256, epochs=3)
    page = open_page(f"/ui/jobs/{job['id']}")
    wait_for_epochs(page, 3)
    wait_until(lambda: count_epochs(page, "kl") == 3)
    assert page.locator("[data-panel=kl] .u-legend tr").count() == 0


def test_slider_moves_by_keys_and_by_mouse(
    open_page: OpenPage, trained: dict[str, dict[str, Any]]
) -> None:
    page = open_page(f"/ui/jobs/{trained['b']['id']}")
    slider = page.locator("#epoch-slider")
    assert shows_epoch(4).search(wait_for_picture(page))
    expect(page.locator("#epoch-shown")).to_contain_text("latest")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#picture")).to_have_attribute("src", shows_epoch(3))
    wait_for_picture(page)
    page.keyboard.press("Home")
    expect(page.locator("#epoch-shown")).to_contain_text("epoch 1")
    page.locator("h1").click()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#epoch-shown")).to_contain_text("epoch 2")
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] - 3, box["y"] + box["height"] / 2)
    expect(page.locator("#picture")).to_have_attribute("src", shows_epoch(4))
    page.mouse.click(box["x"] + 3, box["y"] + box["height"] / 2)
    expect(page.locator("#picture")).to_have_attribute("src", shows_epoch(1))
    wait_for_picture(page)
    page.get_by_role("button", name="Best").click()
    expect(page.locator("#epoch-shown")).to_contain_text("best")
