"""The report: what it draws against the tables, that nothing breaks out of it, and odd studies."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.offline
import pyarrow as pa
import pytest
import yaml
from test_analysis import SEARCHED, VAL_LOSS, failed_row, sample_tables, trial_row

from raydisp import report, results, storage
from raydisp.config.search import Objective
from raydisp.errors import OutputError
from raydisp.figures import Panel
from raydisp.figures.chart import log_ticks
from raydisp.figures.condensation import heat_map_panel, profile_panel
from raydisp.figures.dose import dose_panel
from raydisp.figures.history import history_panel
from raydisp.figures.interactive import draw
from raydisp.report import command, page

EVIL = """<script>alert(1)</script> "quoted" 'single' & <b>bold</b> <img src=x onerror=alert(1)> 漢字"""
STUDY: dict[str, Any] = {
    "name": "weight_search",
    "model": {"source": "scratch", "family": "gpt2", "num_layers": 6, "hidden_size": 128, "num_heads": 4},
    "data": {"source": "python_docs", "context_length": 128},
    "search": {"num_trials": 8, "objective": {"metric": "val_loss", "mode": "min"}},
}


def write_study(folder: Path, tables: results.Tables, study: dict[str, Any] | None = None) -> str:
    """A results folder as a study leaves it behind."""
    place = str(folder)
    results.write_table(storage.join(place, "trials", "all.parquet"), tables.trials)
    results.write_table(storage.join(place, "layers", "all.parquet"), tables.layers)
    text = yaml.safe_dump(STUDY if study is None else study)
    storage.write_bytes(storage.join(place, "study.yaml"), text.encode())
    return place


class Page(HTMLParser):
    """What a browser would see: tags with attributes, text outside scripts, the JSON of the figures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._within = ""
        self.feed(text)
        self.figures = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._within = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within == "script":
            self.scripts[-1] += data
        elif self._within != "style":
            self.text += data


def read_page(place: str) -> Page:
    return Page(Path(place).read_text(encoding="utf-8"))


def traces(figure: Any) -> dict[str, dict[str, Any]]:
    """Traces of a figure by name; a heat map has no name."""
    drawn = figure if isinstance(figure, dict) else figure.to_plotly_json()
    return {trace.get("name", ""): trace for trace in drawn["data"]}


def plots(panel: Panel) -> dict[str, dict[str, dict[str, Any]]]:
    return {plot.name: traces(draw(plot.chart)) for plot in panel.plots}


# --- figures -------------------------------------------------------------------------------------------


def test_history_draws_the_rows():
    rows = [trial_row(trial) for trial in range(8)] + [failed_row(8)]
    panel = history_panel(sample_tables(rows).trials, VAL_LOSS)
    drawn = plots(panel)["history"]
    losses = [row["val_loss"] for row in rows[1:8]]
    assert drawn["trial"]["x"] == list(range(1, 8))
    assert drawn["trial"]["y"] == losses
    assert drawn["best so far"]["y"] == np.minimum.accumulate(losses).tolist()
    assert drawn["baseline"]["y"] == [rows[0]["val_loss"]] * 2
    assert "Not drawn, for want of a value: 1 of 8 trials." in panel.sentence
    assert "nats per token" in panel.sentence


def test_dose_response_draws_the_rows():
    rows = [trial_row(trial) for trial in range(9)]
    panel = dose_panel(sample_tables(rows).trials, VAL_LOSS)
    drawn = plots(panel)
    assert list(drawn) == ["dose-weight", "dose-weight-per-temperature"]
    best = min(rows[1:], key=lambda row: row["val_loss"])
    for name, plot in drawn.items():
        for choice in ("all", "last", "early_half", "late_half"):
            group = [row for row in rows[1:] if row["dispersion.layers"] == choice]
            divisors = [row["dispersion.temperature"] if "per" in name else 1.0 for row in group]
            doses = [row["dispersion.weight"] / by for row, by in zip(group, divisors, strict=True)]
            assert plot[choice]["x"] == doses
            assert plot[choice]["y"] == [row["val_loss"] for row in group]
        assert plot[f"best: trial {best['trial']}"]["y"] == [best["val_loss"]]
        assert plot["baseline"]["y"] == [rows[0]["val_loss"]] * 2
    assert draw(panel.plots[0].chart).layout.xaxis.type == "log"


def test_dose_response_with_weight_zero_is_on_a_linear_axis():
    rows = [trial_row(0), trial_row(1), trial_row(2, **{"dispersion.weight": 0.0})]
    panel = dose_panel(sample_tables(rows).trials, VAL_LOSS)
    drawn = plots(panel)["dose-weight"]
    points = [x for name, trace in drawn.items() if not name.startswith("b") for x in trace["x"]]
    assert sorted(points) == [0.0, rows[1]["dispersion.weight"]]
    assert not panel.plots[0].chart.x.log
    assert "linear axis" in panel.sentence


def test_dose_response_of_weights_below_zero_is_on_a_linear_axis():
    weights = [-0.8, -0.1, 0.0, 0.4]
    rows = [trial_row(0)]
    rows += [trial_row(number + 1, **{"dispersion.weight": weight}) for number, weight in enumerate(weights)]
    panel = dose_panel(sample_tables(rows).trials, VAL_LOSS)
    for plot, divided in zip(panel.plots, (False, True), strict=True):
        doses = sorted(
            weight / row["dispersion.temperature"] if divided else weight
            for weight, row in zip(weights, rows[1:], strict=True)
        )
        points = [
            x for name, t in traces(draw(plot.chart)).items() if not name.startswith("b") for x in t["x"]
        ]
        assert sorted(points) == doses, "0 has a place on it too"
        axis = draw(plot.chart).layout.xaxis
        assert axis.type != "log"
        assert axis.range[0] < doses[0] < doses[-1] < axis.range[1]
        assert "log scale" not in axis.title.text
    assert "linear axis" in panel.sentence


def test_many_layer_choices_share_one_style():
    rows = [trial_row(0)]
    rows += [
        trial_row(trial, **{"dispersion.layers": json.dumps([trial, trial + 1])}) for trial in range(1, 31)
    ]
    rows += [trial_row(31, **{"dispersion.layers": "late_half"})]
    drawn = plots(dose_panel(sample_tables(rows).trials, VAL_LOSS))["dose-weight"]
    assert len(drawn) == 8  # five named choices, the others, the best, the baseline
    assert sum(len(trace["x"]) for name, trace in drawn.items() if name not in ("baseline",)) == 31 + 1
    looks = {
        (trace["marker"]["color"], trace["marker"]["symbol"])
        for name, trace in drawn.items()
        if name != "baseline"
    }
    assert len(looks) == 7


@pytest.mark.parametrize(
    ("low", "high"), [(0.01, 2.0), (0.04, 0.6), (1e-9, 1e9), (0.9, 1.1 * 16), (3e-5, 4e-4), (1e-4, 10.0)]
)
def test_log_axes_have_readable_ticks(low, high):
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 8
    assert [float(text) for _, text in ticks] == [place for place, _ in ticks]


def test_condensation_draws_baseline_and_best_at_their_last_evaluation():
    tables = sample_tables()
    best = min(tables.trials.to_pylist()[1:], key=lambda row: row["val_loss"])["trial"]
    rows = [row for row in tables.layers.to_pylist() if row["step"] == 50]
    profile = plots(profile_panel(tables, VAL_LOSS))["profile"]
    heat_maps = heat_map_panel(tables, VAL_LOSS).plots
    for number, (trial, name) in enumerate([(0, "baseline"), (best, f"best: trial {best}")]):
        mine = [row for row in rows if row["trial"] == trial]
        assert profile[name]["x"] == list(range(7))
        assert profile[name]["y"] == [row["cosine_mean"] for row in mine]
        assert heat_maps[number].title == name
        heat = traces(draw(heat_maps[number].chart))[""]
        counts = np.array([row["histogram"] for row in mine], dtype=float)
        density = counts / counts.sum(axis=1, keepdims=True) / (2 / 128)
        first = 128 - len(heat["y"])  # the empty bins below are cut off
        assert not counts[:, :first].any()
        np.testing.assert_allclose(heat["z"], density.T[first:], rtol=1e-3)  # four digits
        np.testing.assert_allclose(heat["x"], np.arange(7) / 6)
        np.testing.assert_allclose(heat["y"], (np.linspace(-1, 1, 129)[:-1] + 1 / 128)[first:])
    scales = {
        (traces(draw(plot.chart))[""]["zmin"], traces(draw(plot.chart))[""]["zmax"]) for plot in heat_maps
    }
    assert len(scales) == 1


def test_condensation_without_a_baseline_says_so():
    tables = sample_tables([failed_row(0), trial_row(1)])
    for panel in (profile_panel(tables, VAL_LOSS), heat_map_panel(tables, VAL_LOSS)):
        assert len(panel.plots) == 1
        assert "Only the best is drawn: the other has no measure." in panel.sentence


def test_trials_of_unequal_budgets_are_pointed_out():
    trials = sample_tables([trial_row(0), trial_row(1), trial_row(2, num_tokens=1)]).trials
    assert "saw different numbers of tokens" in history_panel(trials, VAL_LOSS).sentence


# --- the page ------------------------------------------------------------------------------------------


def test_page_shows_the_study(tmp_path):
    tables = sample_tables()
    place = report.build_report(write_study(tmp_path, tables))
    assert place == storage.join(str(tmp_path), "report.html")
    made = read_page(place)
    best = min(tables.trials.to_pylist()[1:], key=lambda row: row["val_loss"])
    assert f"Best of 8: trial {best['trial']} with val_loss {best['val_loss']:.3f}" in made.text
    for words in (
        "gpt2 from scratch: 6 layers, hidden size 128, 4 heads",
        "python_docs; context of 128 tokens",
        "204,800",
        "8 completed; baseline completed",
        "2026-03-01 09:30 to 09:41 UTC",
    ):
        assert words in made.text
    places = {attributes.get("id") for _, attributes in made.tags}
    assert set(made.figures) <= places
    assert set(made.figures) == {
        "history", "dose-weight", "dose-weight-per-temperature", "profile", "heat-map-0", "heat-map-1",
        "trend-0", "trend-1", "condensation-loss", "parallel", "cost-train", "cost-memory", "time-line",
    }  # fmt: skip
    assert traces(made.figures["history"])["trial"]["y"] == tables.trials["val_loss"].to_pylist()[1:]
    assert os.listdir(tmp_path).count("report.html") == 1
    assert not [name for name in os.listdir(tmp_path) if name.startswith("_tmp")]


def test_table_has_every_trial_and_sorts_by_numbers():
    rows = [trial_row(0), trial_row(1), failed_row(2), trial_row(3, num_tokens=1)]
    table = page.results_table(sample_tables(rows).trials, VAL_LOSS)
    body = [re.findall(r"<td([^>]*)>(.*?)</td>", row) for row in re.findall(r"<tr class.*?</tr>", table)]
    heads = [
        re.sub(r"<wbr>|<small>.*?</small>|<[^>]*>", "", head) for head in re.findall(r"<th .*?</th>", table)
    ]
    assert heads[:6] == ["trial", "arm", "status", *SEARCHED]
    loss, against = heads.index("val_loss"), heads.index("against baseline")
    assert [row[0][1] for row in body] == ["0", "1", "2", "3"]
    for row, cells in zip(rows, body, strict=True):
        if row["status"] == "completed":
            assert cells[loss][1] == f"{row['val_loss']:.3f}"
            assert f'data-value="{float(row["val_loss"])!r}"' in cells[loss][0]
        else:
            assert cells[loss] == (' class="number"', "")
    assert body[1][against][1] == f"{rows[1]['val_loss'] - rows[0]['val_loss']:+.3f}"
    assert body[0][against][1] == body[2][against][1] == body[3][against][1] == ""  # itself, failed, budget


def test_page_asks_nothing_of_the_network(tmp_path):
    made = read_page(report.build_report(write_study(tmp_path, sample_tables())))
    for tag, attributes in made.tags:
        assert tag not in {"link", "iframe", "img", "object", "embed", "base"}
        assert not {"src", "href", "srcset", "data", "action"} & set(attributes), tag
    policy = [attributes for tag, attributes in made.tags if attributes.get("http-equiv")]
    assert policy[0]["content"].startswith("default-src 'none'")
    own = made.text + made.scripts[0] + made.scripts[1] + made.scripts[3]
    assert "http" not in own
    assert made.scripts[2] == plotly.offline.get_plotlyjs()
    assert "@import" not in page.read_part("page.css")
    assert "url(" not in page.read_part("page.css")


def test_nothing_from_rows_breaks_out(tmp_path):
    searched = SEARCHED | {EVIL: pa.string()}
    rows = [
        trial_row(0, study=EVIL, code_version=EVIL, device=EVIL) | {EVIL: EVIL},
        trial_row(1, arm=EVIL, **{"dispersion.layers": EVIL[:20]}) | {EVIL: EVIL},
        trial_row(2, **{"dispersion.layers": "</script><!--"}) | {EVIL: "<!--<script>"},
        failed_row(3, error_type=EVIL, error_message=EVIL) | {EVIL: EVIL},
        failed_row(4, error_message=f"{EVIL}\n" * 20),
    ]
    study = STUDY | {"name": EVIL, "model": {"source": "hub", "id": EVIL, "revision": EVIL}}
    study["data"] = {"source": "files", "paths": [EVIL], "context_length": EVIL}
    made = read_page(report.build_report(write_study(tmp_path, sample_tables(rows, searched), study)))
    plain = read_page(report.build_report(write_study(tmp_path / "plain", sample_tables())))
    assert {tag for tag, _ in made.tags} - {"details", "summary", "pre"} == {tag for tag, _ in plain.tags}
    assert len(made.scripts) == len(plain.scripts) == 4
    assert not [name for _, attributes in made.tags for name in attributes if name.startswith("on")]
    assert made.text.count(EVIL) > 10
    assert not re.search(r"[<>&]", made.scripts[0] + made.scripts[1])
    # Within the labels of plotly the only tag is ours.
    for figure in made.figures.values():
        for trace in figure["data"]:
            for text in [trace.get("name", ""), *trace.get("hovertext", [])]:
                assert "<" not in text.replace("<br>", "")


CONDENSED, SEARCHED_FIGURES, COSTS = (
    "profile heat-map-0 trend-0",
    "history dose-weight",
    "cost-train cost-memory",
)


@pytest.mark.parametrize(
    ("rows", "figures", "sentence"),
    [
        ([failed_row(trial) for trial in range(4)], "", "No search trial completed (3 failed)"),
        ([trial_row(0)], CONDENSED, "No search trial has ended yet"),
        ([trial_row(0), failed_row(1, "diverged")], CONDENSED, "No search trial completed (1 diverged)"),
        ([trial_row(1)], f"{CONDENSED} {SEARCHED_FIGURES}", "the baseline has not run yet"),
        (
            [trial_row(0), trial_row(1)],
            f"{CONDENSED} heat-map-1 trend-1 {SEARCHED_FIGURES} {COSTS} condensation-loss",
            "Best of 1: trial 1",
        ),
        (
            [trial_row(0), trial_row(1, val_loss=None)],
            f"{CONDENSED} {COSTS}",
            "No completed search trial has a val_loss",
        ),
    ],
)
def test_odd_studies(tmp_path, rows, figures, sentence):
    made = read_page(report.build_report(write_study(tmp_path, sample_tables(rows))))
    assert sentence in made.text
    assert set(made.figures) == {*figures.split(), "time-line"}
    drawn = sum(tag == "figure" for tag, _ in made.tags)
    assert made.text.count("No figure: ") == 12 - drawn


def test_study_that_searches_something_else(tmp_path):
    searched = {"train.learning_rate": pa.float64(), "model.num_layers": pa.int64()}
    rows = [
        trial_row(trial) | {"train.learning_rate": 1e-3 * (trial + 1), "model.num_layers": 6}
        for trial in range(4)
    ]
    study = STUDY | {"search": {"num_trials": 3, "objective": {"metric": "spearman", "mode": "max"}}}
    made = read_page(report.build_report(write_study(tmp_path, sample_tables(rows, searched), study)))
    assert "train.learning_rate and model.num_layers varied too" in made.text
    assert traces(made.figures["history"])["trial"]["y"] == [row["spearman"] for row in rows[1:]]
    assert "Spearman rho of cosine against layer of each completed search trial" in made.text


def test_study_file_may_be_missing_or_broken(tmp_path, caplog):
    place = write_study(tmp_path, sample_tables())
    expected = read_page(report.build_report(place)).figures["history"]
    for content in (None, b"a: [", b"- 1", b"\xff\xfe\x00", b"search: {objective: {metric: nonsense}}"):
        file = tmp_path / "study.yaml"
        file.unlink(missing_ok=True)
        if content is not None:
            file.write_bytes(content)
        assert read_page(report.build_report(place)).figures["history"] == expected
    assert "has no study.yaml" in caplog.text
    assert "search.objective is not understood" in caplog.text


def test_a_uri_is_a_results_folder_too(tmp_path):
    write_study(tmp_path, sample_tables([trial_row(0), trial_row(1)]))
    place = report.build_report(tmp_path.as_uri())
    assert place.startswith("file://")
    assert read_page(str(tmp_path / "report.html")).figures


def test_numbers_that_are_not_finite_are_missing(tmp_path):
    rows = [trial_row(0), trial_row(1, val_bits_per_byte=float("inf")), trial_row(2, val_loss=float("nan"))]
    made = read_page(report.build_report(write_study(tmp_path, sample_tables(rows))))
    assert traces(made.figures["history"])["trial"]["x"] == [1]
    assert "nan" not in made.text
    assert "inf" not in made.text.replace("info", "")


# --- the command line ----------------------------------------------------------------------------------


def test_command_writes_the_report(tmp_path, capsys):
    place = write_study(tmp_path, sample_tables([trial_row(0), trial_row(1)]))
    assert command.main([place]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")


def test_command_says_what_is_wrong(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for argument, words in [
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "empty", "holds no results"),
        ("nonsense://x", "cannot be reached"),
    ]:
        assert command.main([str(argument)]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert str(argument) in printed.err
        assert words in printed.err
        assert len(printed.err.splitlines()) == 1
    assert not list(tmp_path.glob("**/report.html"))


@pytest.mark.parametrize("arguments", [[""], ["x", "--out", ""], ["x", "--figures", ""]])
def test_an_empty_place_is_no_place(arguments, tmp_path, monkeypatch, capsys):
    """As a variable of a shell that is not set gives it: nothing is written anywhere."""
    write_study(tmp_path / "x", sample_tables([trial_row(0), trial_row(1)]))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        command.main(arguments)
    assert ended.value.code == 2
    assert "a place is empty" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*.html")) == []


def test_command_as_a_module(tmp_path):
    command = [sys.executable, "-m", "raydisp.report", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


def test_report_needs_neither_torch_nor_ray():
    code = "import sys, raydisp.report.command; sys.exit(bool({'torch', 'ray', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_nothing_to_write_to_is_our_error(tmp_path):
    place = write_study(tmp_path, sample_tables([trial_row(0), trial_row(1)]))
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        report.build_report(place)


def test_higher_is_better_where_the_study_says_so():
    objective = Objective(metric="layer_cosine_mean", mode="max")
    panel = history_panel(sample_tables().trials, objective)
    values = sample_tables().trials["layer_cosine_mean"].to_pylist()[1:]
    assert plots(panel)["history"]["best so far"]["y"] == np.maximum.accumulate(values).tolist()
    assert "higher is better" in panel.sentence
