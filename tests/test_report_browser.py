"""The report as a browser shows it: its numbers, its script, its looks, in headless Chromium."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pytest
import sample_studies
import scipy.stats
from sample_studies import STUDY
from test_analysis import SEARCHED, failed_row, sample_tables, trial_row
from test_report import EVIL

from raydisp import report

pytestmark = pytest.mark.browser

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
NUMBER = {"abs": 0, "rel": 1e-5}
"""Curves are written with six digits."""


class Browser:
    """A window onto a file, which it may not leave."""

    def __init__(self) -> None:
        webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
        if CHROMIUM is None or DRIVER is None:
            pytest.skip("chromium and chromedriver are not installed")
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
            options.add_argument(f"--{argument}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        self.driver.set_page_load_timeout(120)

    def open(self, page: str, *, width: int = 1200, dark: bool = False, touch: bool = False) -> None:
        self.looks(width=width, dark=dark, touch=touch)
        self.driver.get_log("performance")
        self.driver.get_log("browser")
        self.driver.get(Path(page).resolve().as_uri())

    def looks(self, *, width: int, dark: bool, touch: bool = False) -> None:
        screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": touch}
        self.command("Emulation.setDeviceMetricsOverride", **screen)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", features=[scheme])

    def command(self, name: str, **arguments: Any) -> Any:
        return self.driver.execute_cdp_cmd(name, arguments)

    def ask(self, script: str) -> Any:
        return self.driver.execute_script(f"return {script}")

    def requests(self) -> list[str]:
        """Addresses that were asked for since the page was opened."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [one["params"] for one in messages if one["method"] == "Network.requestWillBeSent"]
        return [one["request"]["url"] for one in sent]

    def complaints(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def figures(self) -> dict[str, dict[str, Any]]:
        """Figure -> trace name -> trace, as plotly has them after drawing."""
        found = self.ask(
            "Object.fromEntries([...document.querySelectorAll('.plot')].map((place) => [place.id, "
            "place.data.map(({name, x, y, z, error_x, error_y, visible, hovertext}) => "
            "({name, x, y, z, error_x, error_y, visible, hovertext}))]))"
        )
        return {
            place: {trace.get("name") or str(number): trace for number, trace in enumerate(traces)}
            for place, traces in found.items()
        }


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    window = Browser()
    yield window
    window.driver.quit()


@pytest.fixture(scope="module")
def armed_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three arms, two objectives, a confirm phase."""
    study = STUDY | {"search": {"objective": [{"metric": "val_loss"}, {"metric": "layer_cosine_mean"}]}}
    folder = tmp_path_factory.mktemp("armed")
    return report.build_report(sample_studies.write(folder, sample_studies.armed(), study))


@pytest.fixture(scope="module")
def small_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A study of one arm, some of its trials pruned."""
    folder = tmp_path_factory.mktemp("small")
    return report.build_report(sample_studies.write(folder, sample_studies.small(30)))


def rows_of(page: str, table: str) -> list[dict[str, Any]]:
    """A dataset beside the page, read by pyarrow alone."""
    rows: list[dict[str, Any]] = ds.dataset(Path(page).parent / table).to_table().to_pylist()
    return rows


# --- the numbers ---------------------------------------------------------------------------------------


def test_numbers_of_a_search(browser: Browser, small_page: str) -> None:
    browser.open(small_page)
    drawn = browser.figures()
    trials, layers = rows_of(small_page, "trials"), rows_of(small_page, "layers")
    baseline = trials[0]
    done = [row for row in trials[1:] if row["status"] == "completed"]
    losses = [row["val_loss"] for row in done]
    best = done[int(np.argmin(losses))]

    history = drawn["history"]
    assert history["trial"]["x"] == [row["trial"] for row in done]
    assert history["trial"]["y"] == losses
    assert history["best so far"]["y"] == np.minimum.accumulate(losses).tolist()
    assert history["baseline"]["y"] == [baseline["val_loss"]] * 2

    for place, divided in (("dose-weight", False), ("dose-weight-per-temperature", True)):
        for choice in ("all", "last", "early_half", "late_half"):
            own = [row for row in done if row["dispersion.layers"] == choice]
            by = [row["dispersion.temperature"] if divided else 1.0 for row in own]
            doses = [row["dispersion.weight"] / divisor for row, divisor in zip(own, by, strict=True)]
            assert drawn[place][choice]["x"] == pytest.approx(doses)
            assert drawn[place][choice]["y"] == [row["val_loss"] for row in own]
        assert drawn[place][f"best: trial {best['trial']}"]["y"] == [best["val_loss"]]

    points = drawn["surface"]["trial"]
    assert points["x"] == [row["dispersion.weight"] for row in done]
    assert points["y"] == [row["dispersion.temperature"] for row in done]
    surface = [value for line in drawn["surface"]["0"]["z"] for value in line if value is not None]
    assert min(losses) <= min(surface)
    assert max(surface) <= max(losses)

    for number, (name, row) in enumerate((("baseline", baseline), (f"best: trial {best['trial']}", best))):
        own = [one for one in layers if one["trial"] == row["trial"]]
        last = [one for one in own if one["step"] == 50]
        assert drawn["profile"][name]["y"] == [one["cosine_mean"] for one in last]
        for frame, step in enumerate((25, 50)):
            at = [one["histogram"] for one in own if one["step"] == step]
            counts = np.array(at, dtype=float)
            density = (counts / counts.sum(axis=1, keepdims=True) * 64).T
            z = np.array(drawn[f"heat-map-{number}"][str(frame)]["z"])
            np.testing.assert_allclose(z, density[128 - len(z) :], rtol=1e-3)
        for layer in range(7):
            trend = drawn[f"trend-{number}"][f"layer {layer}"]
            assert trend["y"] == [one["cosine_mean"] for one in own if one["layer"] == layer]

    assert drawn["condensation-loss"]["search"]["x"] == [row["layer_cosine_mean"] for row in done]
    assert drawn["condensation-loss"]["search"]["y"] == losses
    assert drawn["condensation-loss"]["baseline"]["y"] == [baseline["val_loss"]]

    lines = drawn["parallel"]
    placed = [*lines["other trials"]["y"], *lines["best tenth"]["y"]]
    scaled = (np.array(losses) - min(losses)) / (max(losses) - min(losses))
    assert sorted(placed[3::5]) == pytest.approx(sorted(scaled.tolist()))

    assert sorted(drawn["cost-train"]["one run"]["x"]) == sorted(row["train_s"] for row in [baseline, *done])
    medians = [baseline["train_s"], statistics.median(row["train_s"] for row in done)]
    assert drawn["cost-train"]["median"]["x"] == pytest.approx(medians)
    assert drawn["cost-memory"]["median"]["x"] == pytest.approx([900_000_000 / 2**20] * 2)


def test_numbers_of_learning_curves_and_the_time_line(browser: Browser, small_page: str) -> None:
    browser.open(small_page)
    drawn = browser.figures()
    trials, steps = rows_of(small_page, "trials"), rows_of(small_page, "steps")
    evals = rows_of(small_page, "evals")
    pruned = [row["trial"] for row in trials if row["status"] == "pruned"]
    for place, column in (
        ("curve-lm-loss", "lm_loss"),
        ("curve-dispersion-loss", "dispersion_loss"),
        ("curve-grad-norm", "grad_norm"),
    ):
        values = [row[column] for row in steps if row["trial"] in pruned]
        mine = [value for value in drawn[place]["pruned"]["y"] if value is not None]
        assert mine == pytest.approx(values, **NUMBER)
    base = [row["lm_loss"] for row in steps if row["trial"] == 0]
    assert drawn["curve-lm-loss"]["baseline"]["y"][:-1] == pytest.approx(base, **NUMBER)
    validation = [row["value"] for row in evals if row["trial"] == 0 and row["step"] > 0]
    assert drawn["curve-val-loss"]["baseline"]["y"][:-1] == pytest.approx(validation, **NUMBER)

    start = min(row["started_at"] for row in trials)
    for status in ("completed", "pruned"):
        bars = drawn["time-line"][status]["x"]
        own = [row for row in trials if row["status"] == status]
        for bar, key in ((bars[::3], "started_at"), (bars[1::3], "ended_at")):
            minutes = [(row[key] - start).total_seconds() / 60 for row in own]
            assert bar == pytest.approx(minutes)


def test_importance_is_what_optuna_says(browser: Browser, small_page: str) -> None:
    import optuna

    browser.open(small_page)
    drawn = browser.figures()["importance-0"]["PED-ANOVA"]
    done = [row for row in rows_of(small_page, "trials")[1:] if row["status"] == "completed"]
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study()
    weights = [row["dispersion.weight"] for row in done]
    temperatures = [row["dispersion.temperature"] for row in done]
    space = {
        "dispersion.weight": optuna.distributions.FloatDistribution(min(weights), max(weights), log=True),
        "dispersion.temperature": optuna.distributions.FloatDistribution(
            min(temperatures), max(temperatures), log=max(temperatures) > 20 * min(temperatures)
        ),
        "dispersion.layers": optuna.distributions.CategoricalDistribution(
            ("all", "early_half", "last", "late_half")
        ),
    }
    for row in done:
        params = {name: row[name] for name in SEARCHED}
        trial = optuna.trial.create_trial(params=params, distributions=space, value=row["val_loss"])
        study.add_trial(trial)
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
    found = sorted(evaluator.evaluate(study).values(), reverse=True)
    assert drawn["x"] == pytest.approx([value / sum(found) for value in found])


def test_numbers_of_a_confirm_phase(browser: Browser, armed_page: str) -> None:
    browser.open(armed_page)
    drawn = browser.figures()
    rows = rows_of(armed_page, "trials")

    def confirmed(arm: str, column: str) -> list[float]:
        own = [row for row in rows if (row["phase"], row["arm"]) == ("confirm", arm)]
        return [row[column] for row in sorted(own, key=lambda row: row["seed"])]

    base = np.array(confirmed("baseline", "test_loss"))
    means = []
    for number, arm in enumerate(("dispersion", "noisy")):
        each = np.array(confirmed(arm, "test_loss")) - base
        means.append(each.mean())
        mine = drawn["verdict"]["one seed"]["x"][6 * number : 6 * number + 6]
        assert mine == pytest.approx(each.tolist())
        half = 2.5706 * each.std(ddof=1) / math.sqrt(6)  # Student's t, 5 degrees of freedom
        assert drawn["verdict"]["mean and 95 % interval"]["error_x"]["array"][number] == pytest.approx(
            half, rel=1e-4
        )
    assert drawn["verdict"]["mean and 95 % interval"]["x"] == pytest.approx(means)
    assert drawn["dose-weight"]["confirmed"]["y"] == [
        pytest.approx(np.mean(confirmed("dispersion", "val_loss")))
    ]
    assert drawn["dose-layer-cosine-mean-weight"]["confirmed"]["y"] == [
        pytest.approx(np.mean(confirmed("dispersion", "layer_cosine_mean")))
    ]
    assert drawn["cost-train"]["median"]["x"] == [100.0, 112.0, 112.0]

    search = [row for row in rows if row["phase"] == "search" and row["arm"] != "baseline"]
    points = [(row["val_loss"], row["layer_cosine_mean"]) for row in search]
    front = [
        point
        for point in points
        if not any(
            all(a <= b for a, b in zip(other, point, strict=True)) and other != point for other in points
        )
    ]
    mine = drawn["front-0"]["Pareto front"]
    assert sorted(zip(mine["x"], mine["y"], strict=True)) == sorted(front)
    for arm in ("dispersion", "noisy"):
        own = [row["val_loss"] for row in search if row["arm"] == arm]
        assert drawn["history"][arm]["y"] == own
        assert drawn["history"][f"best so far: {arm}"]["y"] == np.minimum.accumulate(own).tolist()


# --- the page ------------------------------------------------------------------------------------------


def test_no_complaint_and_no_request_leaves_the_file(
    browser: Browser, armed_page: str, small_page: str
) -> None:
    for page in (armed_page, small_page):
        browser.open(page)
        assert browser.complaints() == []
        asked = [address for address in browser.requests() if not address.startswith(("data:", "blob:"))]
        assert asked == [Path(page).resolve().as_uri()]
        assert browser.ask("[...document.querySelectorAll('.plot')].every((p) => p.querySelector('svg'))")


@pytest.mark.parametrize("column", ["val_loss", "trial", "dispersion.layers"])
def test_tables_sort(browser: Browser, small_page: str, column: str) -> None:
    browser.open(small_page)
    trials = rows_of(small_page, "trials")
    heads = [head.replace("\u200b", "") for head in browser.ask(
        "[...document.querySelectorAll('th span')].map((head) => head.textContent)")]  # fmt: skip
    place = heads.index(column)
    read = (
        f"[...document.querySelectorAll('tbody tr')].map((row) => row.cells[{place}])"
        ".map((cell) => cell.dataset.value ?? cell.textContent)"
    )
    for descending in (False, True):
        browser.ask(f"document.querySelectorAll('th button')[{place}].click()")
        shown = [cell for cell in browser.ask(read) if cell]
        expected = sorted((row[column] for row in trials), reverse=descending)
        assert [type(expected[0])(cell) for cell in shown] == expected
        order = browser.ask(f"document.querySelectorAll('th')[{place}].getAttribute('aria-sort')")
        assert order == ("descending" if descending else "ascending")


def test_numbers_of_a_comparison(browser: Browser, tmp_path: Path, armed_page: str, small_page: str) -> None:
    out = str(tmp_path / "comparison.html")
    report.build_comparison([str(Path(page).parent) for page in (armed_page, small_page)], out=out)
    browser.open(out)
    drawn = browser.figures()

    confirmed = [row for row in rows_of(armed_page, "trials") if row["phase"] == "confirm"]
    losses = {(row["arm"], row["seed"]): row["test_loss"] for row in confirmed}
    arms = [arm for arm in dict.fromkeys(arm for arm, _ in losses) if arm != "baseline"]
    seeds = sorted({seed for _, seed in losses})
    squares = drawn["verdicts-0"]["mean and 95 % interval"]
    assert len(squares["x"]) == len(arms) > 1
    found = dict(zip([text.split(": ", 1)[1] for text in squares["hovertext"]], squares["x"], strict=True))
    for arm in arms:
        pairs = [losses[arm, seed] - losses["baseline", seed] for seed in seeds]
        mean = next(value for text, value in found.items() if text.startswith(f"{arm} "))
        assert mean == pytest.approx(statistics.fmean(pairs), **NUMBER)
        place = squares["x"].index(mean)
        half = scipy.stats.t.ppf(0.975, len(pairs) - 1) * statistics.stdev(pairs) / math.sqrt(len(pairs))
        assert squares["error_x"]["array"][place] == pytest.approx(half, **NUMBER)

    expected = []
    for page in (armed_page, small_page):
        search = [row for row in rows_of(page, "trials") if row["phase"] == "search"]
        done = [row for row in search if row["status"] == "completed"]
        baseline = min(row["val_loss"] for row in done if row["arm"] == "baseline")
        others = dict.fromkeys(row["arm"] for row in search if row["arm"] != "baseline")
        expected += [min(row["val_loss"] for row in done if row["arm"] == arm) - baseline for arm in others]
    assert drawn["gain-0"]["best"]["x"] == pytest.approx(expected, **NUMBER)

    for page, name in ((armed_page, "armed"), (small_page, "small")):
        layers = rows_of(page, "layers")
        lines = [line for key, line in drawn["profiles"].items() if key.endswith("baseline")]
        last = max(row["step"] for row in layers if row["trial"] == 0)
        profile = [
            row["cosine_mean"]
            for row in sorted(layers, key=lambda row: row["layer"])
            if row["trial"] == 0 and row["step"] == last
        ]
        assert any(line["y"] == pytest.approx(profile, **NUMBER) for line in lines), name


def test_each_table_of_a_comparison_sorts_by_itself(
    browser: Browser, tmp_path: Path, armed_page: str, small_page: str
) -> None:
    out = str(tmp_path / "comparison.html")
    report.build_comparison([str(Path(page).parent) for page in (armed_page, small_page)], out=out)
    browser.open(out)
    read = (
        "[...document.querySelectorAll('table')[1].tBodies[0].rows].map((row) => "
        "Number(row.cells[8].dataset.value))"
    )
    other = "[...document.querySelectorAll('table')[0].tBodies[0].rows].map((row) => row.textContent)"
    before = browser.ask(other)
    browser.ask("document.querySelectorAll('table')[1].querySelectorAll('th button')[8].click()")
    shown = browser.ask(read)
    assert shown == sorted(shown)
    assert len(shown) == 3
    assert browser.ask(other) == before
    assert browser.complaints() == []


def test_dark_follows_the_system(browser: Browser, small_page: str) -> None:
    browser.open(small_page, dark=True)
    ink = "getComputedStyle(document.querySelector('#history .xtick text')).fill"
    paper = "getComputedStyle(document.body).backgroundColor"
    assert (browser.ask(ink), browser.ask(paper)) == ("rgb(230, 237, 243)", "rgb(15, 19, 24)")
    browser.looks(width=1200, dark=False)
    deadline = time.monotonic() + 20  # the figures are drawn anew
    while browser.ask(ink) != "rgb(31, 35, 40)" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (browser.ask(ink), browser.ask(paper)) == ("rgb(31, 35, 40)", "rgb(255, 255, 255)")


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_scrolls_only_downwards(browser: Browser, armed_page: str, dark: bool) -> None:
    browser.open(armed_page, width=390, dark=dark, touch=True)
    assert browser.ask("document.documentElement.scrollWidth") == 390
    # What is wider, for its labels' sake, scrolls in a box of its own.
    boxes = "[...document.querySelectorAll('.plot')].map((plot) => plot.parentNode.clientWidth)"
    assert browser.ask(f"Math.max(...{boxes})") < 390
    wide = browser.ask(
        "[...document.querySelectorAll('.plot')].filter((p) => p.clientWidth > 390).map((p) => p.id)"
    )
    assert wide == ["parallel"]
    # No title of an axis is wider than its drawing.
    cut = browser.ask(
        "[...document.querySelectorAll('.xtitle')].filter((title) => { "
        "const a = title.getBoundingClientRect(), b = title.closest('.plot').getBoundingClientRect(); "
        "return a.left < b.left - 1 || a.right > b.right + 1 }).map((title) => title.textContent)"
    )
    assert cut == []


def test_no_title_of_an_axis_is_cut_off(browser: Browser, tmp_path: Path) -> None:
    """One spike makes the axis of the gradient norm a log axis, whose title is the longest there is."""
    tables = sample_studies.small()
    norms = tables.steps["grad_norm"].to_pylist()
    norms[7] = 100.0
    place = tables.steps.column_names.index("grad_norm")
    steps = tables.steps.set_column(place, "grad_norm", [norms])
    page = report.build_report(
        sample_studies.write(tmp_path, dataclasses.replace(tables, steps=steps.cast(tables.steps.schema)))
    )
    for width in (390, 1200):
        browser.open(page, width=width)
        cut = browser.ask(
            "[...document.querySelectorAll('.xtitle, .ytitle')].filter((title) => { "
            "const a = title.getBoundingClientRect(), b = title.closest('.plot').getBoundingClientRect(); "
            "return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || "
            "a.bottom > b.bottom + 1 }).map((title) => title.textContent)"
        )
        assert cut == []
    titles = browser.ask("document.querySelector('#curve-grad-norm .ytitle').textContent")
    assert "log scale" in titles


def test_no_labels_lie_over_each_other(browser: Browser, armed_page: str) -> None:
    for width in (390, 1200):
        browser.open(armed_page, width=width)
        over = browser.ask(
            "[...document.querySelectorAll('.plot')].flatMap((plot) => "
            "['.xtick text', '.ytick text', '.legendtext', '.annotation-text'].flatMap((kind) => { "
            "const boxes = [...plot.querySelectorAll(kind)].map((text) => text.getBoundingClientRect()); "
            "return boxes.flatMap((a, i) => boxes.slice(i + 1).filter((b) => a.left < b.right - 2 && "
            "b.left < a.right - 2 && a.top < b.bottom - 4 && b.top < a.bottom - 4)"
            ".map(() => plot.id + kind)) }))"
        )
        # Slanted names are wider than they look.
        assert [one for one in over if one != "parallel.xtick text"] == []


def test_print_is_white_and_whole(browser: Browser, armed_page: str) -> None:
    browser.open(armed_page, dark=True)
    content = base64.b64decode(browser.command("Page.printToPDF", printBackground=True)["data"])
    assert content.startswith(b"%PDF")
    browser.ask("dispatchEvent(new Event('beforeprint'))")
    browser.command("Emulation.setEmulatedMedia", media="print")
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    ink = "getComputedStyle(document.querySelector('#history .xtick text')).fill"
    assert browser.ask(ink) == "rgb(31, 35, 40)"
    assert browser.ask("document.documentElement.classList.contains('printing')")
    browser.ask("dispatchEvent(new Event('afterprint'))")
    browser.command("Emulation.setEmulatedMedia", media="")


def test_the_slider_goes_back_to_earlier_evaluations(browser: Browser, small_page: str) -> None:
    browser.open(small_page)
    shown = "document.getElementById('heat-map-0').data.map((trace) => trace.visible)"
    assert browser.ask(shown) == [False, True]
    browser.ask(
        "((place) => Plotly.restyle(place, ...place.layout.sliders[0].steps[0].args))"
        "(document.getElementById('heat-map-0'))"
    )
    assert browser.ask(shown) == [True, False]


@pytest.mark.parametrize(
    "rows",
    [
        [failed_row(trial) for trial in range(3)],
        [trial_row(0)],
        [trial_row(0), trial_row(1)],
        [trial_row(1, arm=EVIL), failed_row(2, error_message=f"<script>document.title = 1</script>{EVIL}")],
    ],
    ids=["all failed", "baseline alone", "one trial", "evil names"],
)
def test_odd_studies_draw(browser: Browser, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    browser.open(report.build_report(sample_studies.write(tmp_path, sample_tables(rows))))
    assert browser.complaints() == []
    assert browser.ask("document.title") == "weight_search · raydisp"
    assert browser.ask("[...document.querySelectorAll('.plot')].every((p) => p.querySelector('svg'))")
    with pytest.raises(Exception, match="no such alert"):
        _ = browser.driver.switch_to.alert


def test_two_thousand_trials_open(browser: Browser, tmp_path: Path) -> None:
    page = report.build_report(sample_studies.write(tmp_path, sample_studies.many(2000)))
    browser.open(page, width=390, touch=True)
    assert browser.complaints() == []
    assert browser.ask("document.querySelectorAll('tbody tr').length") == 2001
    assert browser.ask("document.documentElement.scrollWidth") == 390
