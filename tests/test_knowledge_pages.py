"""What a model knows beside what it paints, in a real browser."""

import math
import re
from typing import Any

import pytest
from known_measures import COLOUR_PREVALENCE, FOREGROUND_SHARE, make_measures
from long_histories import fill_database
from page_views import (
    NEEDS_BROWSER,
    OpenPage,
    count_epochs,
    count_pixels,
    is_marked,
    mark,
    wait_until,
)
from playwright.sync_api import expect
from service import Service
from sqlalchemy import update
from sqlmodel import col
from stored_studies import store_study
from test_study_browser import DESKTOP, PHONE, find_violations

from server.database.engine import open_database
from server.models.epochs import EpochMetrics
from server.settings import Settings

pytest_plugins = ["browser_visits"]
pytestmark = NEEDS_BROWSER

MEASURED = ("ranking", "information")
#: The columns of epochs that were recorded before there were measures.
OLD: dict[str, Any] = {
    column.name: None
    for column in EpochMetrics.__table__.columns  # type: ignore[attr-defined]
    if column.nullable and column.name.startswith("val_")
    and not re.search("recall$|val_foreground_iou$|accuracy$", column.name)
}  # fmt: skip


def change_epochs(service: Service, *wanted: Any, **values: Any) -> None:
    engine = open_database(Settings(data_dir=service.data_dir))
    with engine.begin() as connection:
        connection.execute(update(EpochMetrics).where(*wanted).values(values))
    engine.dispose()


def test_levels_of_chance_and_the_true_share_are_drawn(
    own_service: Service, open_page: OpenPage
) -> None:
    (job_id,) = fill_database(own_service.data_dir, num_jobs=1, num_epochs=5)
    page = open_page(f"/ui/jobs/{job_id}", url=own_service.url)
    painted, ranking = (page.locator(f"[data-panel={name}]") for name in ("painted", "ranking"))
    expect(painted).to_have_attribute("data-lines", str(FOREGROUND_SHARE))
    expect(ranking).to_have_attribute("data-lines", f"{FOREGROUND_SHARE} {COLOUR_PREVALENCE}")
    assert count_pixels(page, "painted", "--text") > 100
    assert count_pixels(page, "ranking", "--text") == 0
    label = page.locator("[data-panel=information] .plot").get_attribute("aria-label") or ""
    assert re.search(r"last: mutual information [\d.]+, KL [\d.]+$", label)
    expect(page.locator(".knowledge")).to_contain_text("It paints 18.5% of the cells where 6.9%")


def test_error_of_the_information_is_drawn(own_service: Service, open_page: OpenPage) -> None:
    (job_id,) = fill_database(own_service.data_dir, num_jobs=1, num_epochs=5)
    drawn = []
    for error in (0.001, 2.0):
        change_epochs(own_service, val_mutual_information_error=error)
        page = open_page(f"/ui/jobs/{job_id}", url=own_service.url)
        drawn.append(count_pixels(page, "information", "--curve-0"))
    assert drawn[1] > drawn[0] + 5 * 20


def test_silent_dimension_is_seen_at_once(own_service: Service, open_page: OpenPage) -> None:
    (job_id,) = fill_database(own_service.data_dir, num_jobs=1, num_epochs=5)
    known = [1.0] * 10
    known[3] = 0.001
    change_epochs(own_service, val_information_per_dimension=known)
    page = open_page(f"/ui/jobs/{job_id}", url=own_service.url)
    expect(page.locator("#dimensions rect.information")).to_have_count(10)
    silent = page.locator("#dimensions .silent")
    expect(silent).to_have_count(1)
    other = page.locator("#dimensions rect.kl:not(.silent)").first
    fill = "bar => getComputedStyle(bar).fill"
    assert silent.evaluate(fill) != other.evaluate(fill)
    expect(page.get_by_label(re.compile("d3: KL .*, information 0.001, silent"))).to_be_visible()


def test_job_older_than_the_measures_says_so_in_one_line(
    own_service: Service, open_page: OpenPage
) -> None:
    (job_id,) = fill_database(own_service.data_dir, num_jobs=1, num_epochs=5)
    change_epochs(own_service, **OLD)
    page = open_page(f"/ui/jobs/{job_id}", url=own_service.url)
    expect(page.locator("#older")).to_be_visible()
    for name in MEASURED:
        expect(page.locator(f"[data-panel={name}]")).to_be_hidden()
    expect(page.locator("#dimensions")).to_be_hidden()
    expect(page.locator("[data-panel=kl]")).to_be_visible()
    assert count_epochs(page, "painted") == 5
    expect(page.locator(".knowledge")).to_have_text(
        "It paints 18.5% of the cells where 7.0% are foreground."
    )
    page = open_page(f"/ui/compare?job_id={job_id}", url=own_service.url)
    expect(page.locator("#older")).to_be_visible()
    expect(page.locator("[data-panel=val_foreground_ap]")).to_be_hidden()
    expect(page.locator("#measures")).not_to_contain_text("AP")


def test_measures_appear_once_an_older_job_goes_on(
    own_service: Service, open_page: OpenPage
) -> None:
    (job_id,) = fill_database(own_service.data_dir, num_jobs=1, num_epochs=5)
    change_epochs(own_service, **OLD)
    page = open_page(f"/ui/jobs/{job_id}", url=own_service.url)
    expect(page.locator("#older")).to_be_visible()
    mark(page)
    change_epochs(own_service, col(EpochMetrics.epoch) == 5, **make_measures())
    page.evaluate("Losslab.refresh()")
    expect(page.locator("#older")).to_be_hidden()
    canvas = page.locator("[data-panel=ranking] canvas")
    wait_until(lambda: (canvas.bounding_box() or {"width": 0})["width"] > 100)
    expect(page.locator("#dimensions rect.information")).to_have_count(10)
    assert is_marked(page)


def test_bars_follow_a_job_that_runs(own_service: Service, open_page: OpenPage) -> None:
    job = own_service.train("b", num_samples=400, epochs=3)
    page = open_page(f"/ui/jobs/{job['id']}", url=own_service.url)
    mark(page)
    expect(page.locator(".knowledge")).to_contain_text("after the first epoch")
    own_service.start("worker")
    expect(page.locator("#state")).to_have_attribute("data-status", "succeeded")
    expect(page.locator("#dimensions .chart")).to_have_attribute(
        "aria-label", re.compile("after epoch 3, in nats: d0: KL ")
    )
    for name in MEASURED:
        wait_until(lambda name=name: count_epochs(page, name) == 3)
    expect(page.locator(".knowledge")).to_contain_text("Its latent carries")
    most = page.locator("#most-information").text_content()
    assert float(most or "nan") == pytest.approx(math.log(40))
    assert is_marked(page)


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE])
def test_pages_have_no_barrier_and_fit(
    own_service: Service, open_page: OpenPage, viewport: dict[str, int]
) -> None:
    job_ids = fill_database(own_service.data_dir, num_jobs=3, num_epochs=5)
    engine = open_database(Settings(data_dir=own_service.data_dir))
    outcomes = {"a": ["decision_collapse"] * 2, "b": ["healthy"] * 2, "c": ["mode_collapse"] * 2}
    study_id = store_study(engine, outcomes)
    engine.dispose()
    ids = "&".join(f"job_id={job_id}" for job_id in job_ids)
    for path in (f"/ui/jobs/{job_ids[0]}", f"/ui/compare?{ids}", f"/ui/studies/{study_id}"):
        page = open_page(path, url=own_service.url, viewport=viewport)
        page.wait_for_load_state("networkidle")
        for details in page.locator("summary").all():
            details.click()
        assert find_violations(page) == [], path
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width == viewport["width"], path


def test_curves_of_jobs_are_compared_with_chance(own_service: Service, open_page: OpenPage) -> None:
    job_ids = fill_database(own_service.data_dir, num_jobs=3, num_epochs=5)
    ids = "&".join(f"job_id={job_id}" for job_id in job_ids)
    page = open_page(f"/ui/compare?{ids}", url=own_service.url)
    for name, level in (
        ("painted_share", FOREGROUND_SHARE),
        ("val_foreground_ap", FOREGROUND_SHARE),
        ("val_colour_ap", COLOUR_PREVALENCE),
    ):
        expect(page.locator(f"[data-panel={name}]")).to_have_attribute("data-lines", str(level))
    assert count_epochs(page, "val_mutual_information") == 5
    rows = page.locator("#measures tbody tr")
    expect(rows).to_have_count(3)
    heads = page.locator("#measures th[scope=colgroup]")
    expect(heads).to_have_text(["what it paints", "what it knows"])
    rows.nth(1).hover()
    faded = page.locator("[data-panel=val_foreground_ap] .u-series").nth(1)
    assert faded.evaluate("row => getComputedStyle(row).opacity") != "1"
