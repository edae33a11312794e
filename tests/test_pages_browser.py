"""The other pages in headless Chromium: condensation of models, and the report that is served and renewed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_analysis import sample_tables, trial_row
from test_measure import sample as measured_model
from test_report import EVIL, write_study
from test_report_browser import Browser
from test_watch import add_trials

from raydisp.measure import page as measure_page
from raydisp.report.watch import ReportServer, Watched

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    window = Browser()
    yield window
    window.driver.quit()


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.1)
    return found


# --- models --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Any]]:
    """The page of three models, one of an evil name, and what it was made from."""
    models = [
        measured_model("small", parameters=10**7),
        measured_model(EVIL, parameters=10**8, layers=4),
        measured_model("large", parameters=10**9, layers=6),
    ]
    place = tmp_path_factory.mktemp("family") / "condensation.html"
    place.write_text(measure_page.render_page(models), encoding="utf-8")
    return str(place), models


def test_numbers_of_a_family(browser: Browser, family: tuple[str, list[Any]]) -> None:
    page, models = family
    browser.open(page)
    assert browser.complaints() == []
    asked = [address for address in browser.requests() if not address.startswith(("data:", "blob:"))]
    assert asked == [Path(page).resolve().as_uri()]
    drawn = browser.figures()
    for number, (_, layers) in enumerate(models):
        line = drawn[f"heat-map-{number}"]["mean"]
        assert line["y"] == [row["cosine_mean"] for row in layers]
        assert line["x"] == pytest.approx([row["depth_frac"] for row in layers])
    for name, column in (("size-spearman", "spearman"), ("size-last-half", "last_half_mean")):
        line = drawn[name]["by size"]
        assert line["x"] == [row["num_parameters"] for row, _ in models]
        assert line["y"] == pytest.approx([row[column] for row, _ in models])
    shown = browser.ask("[...document.querySelectorAll('tbody tr')].map((row) => row.cells[0].textContent)")
    assert shown == [row["name"] for row, _ in models]
    assert browser.ask("document.title") == "Condensation · raydisp"


def test_the_models_sort_and_fit_a_phone(browser: Browser, family: tuple[str, list[Any]]) -> None:
    page, models = family
    browser.open(page, width=390, dark=True, touch=True)
    assert browser.ask("document.documentElement.scrollWidth") == 390
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(15, 19, 24)"
    for _ in range(2):
        browser.ask("document.querySelectorAll('th button')[1].click()")
    values = browser.ask(
        "[...document.querySelectorAll('tbody tr')].map((row) => Number(row.cells[1].dataset.value))"
    )
    assert values == sorted((row["num_parameters"] for row, _ in models), reverse=True)


# --- a study that runs ---------------------------------------------------------------------------------


def test_an_open_page_is_renewed_and_stays_where_it_was(browser: Browser, tmp_path: Path) -> None:
    watched = Watched(str(tmp_path / "study"))
    with ReportServer(watched, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        browser.looks(width=1000, dark=False)
        browser.driver.get_log("browser")
        browser.driver.get_log("performance")
        browser.driver.get(server.url)
        assert "Nothing to show yet" in browser.ask("document.body.textContent")

        folder = write_study(tmp_path / "study", sample_tables([trial_row(0), trial_row(1)]))
        watched.refresh()
        numbers = "[...document.querySelectorAll('tbody tr')].map((row) => row.cells[0].textContent)"
        wait_for(lambda: browser.ask(numbers) == ["0", "1"])
        for _ in range(2):
            browser.ask("document.querySelectorAll('th button')[0].click()")
        assert browser.ask(numbers) == ["1", "0"]
        browser.ask("window.scrollTo(0, 700)")

        add_trials(folder, 2, 3)
        watched.refresh()
        wait_for(lambda: browser.ask(numbers) == ["3", "2", "1", "0"])
        assert browser.ask("document.querySelector('th').getAttribute('aria-sort')") == "descending"
        assert browser.ask("Math.round(scrollY)") == 700
        history = browser.figures()["history"]["trial"]
        assert history["x"] == [1, 2, 3]
        assert browser.complaints() == []
        asked = [address for address in browser.requests() if not address.startswith(("data:", "blob:"))]
        assert {address.rsplit("/", 1)[0] + "/" for address in asked} == {server.url}
        server.shutdown()
