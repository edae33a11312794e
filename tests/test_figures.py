"""Figures against numbers worked out here from the rows, on page and paper, for odd and large studies."""

from __future__ import annotations

import dataclasses
import html
import importlib.util
import itertools
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import sample_studies
from sample_studies import STUDY
from test_analysis import SEARCHED, VAL_LOSS, failed_row, sample_tables, trial_row, trial_table
from test_report import EVIL, read_page, traces

from raydisp import analysis, report, verdict
from raydisp.analysis.importance import has_fanova
from raydisp.analysis.training import MAX_CURVE_POINTS, MAX_CURVES, thin
from raydisp.config.search import Objective
from raydisp.figures import build_panels
from raydisp.figures.chart import Axis, Chart, Panel, Texts, log_ticks
from raydisp.figures.condensation import against_panel, heat_map_panel, trend_panel
from raydisp.figures.dose import dose_panel, surface_panel
from raydisp.figures.fields import importance_panel, parallel_panel
from raydisp.figures.front import front_panel
from raydisp.figures.history import history_panel
from raydisp.figures.interactive import draw
from raydisp.figures.paper import write_figures
from raydisp.figures.style import DARK_COLOURS
from raydisp.figures.training import curves_panel, time_line_panel
from raydisp.figures.verdict import cost_panel
from raydisp.report import command, comparison

COSINE = Objective(metric="layer_cosine_mean", mode="min")
OBJECTIVES = [VAL_LOSS, COSINE]
SVG = b"<svg"


@pytest.fixture(scope="module")
def armed() -> Any:
    return sample_studies.armed()


def marks(panel: Panel, plot: str) -> dict[str, Any]:
    """The marks of a plot by their names."""
    (found,) = (one for one in panel.plots if one.name == plot)
    return {getattr(mark, "name", type(mark).__name__): mark for mark in found.chart.marks}


def confirmed(tables: Any, arm: str, column: str) -> list[float]:
    rows = tables.trials.to_pylist()
    return [row[column] for row in rows if (row["phase"], row["arm"]) == ("confirm", arm)]


# --- values compare at equal tokens only ---------------------------------------------------------------


def test_no_value_of_another_budget_is_compared() -> None:
    rows = [trial_row(0), trial_row(1), trial_row(2), trial_row(3, val_loss=1.0, num_tokens=100)]
    trials = trial_table(rows)
    assert [row["trial"] for row, _ in analysis.scored(trials, VAL_LOSS)] == [1, 2]
    assert analysis.best_trial(trials, VAL_LOSS)["trial"] != 3
    assert 3 not in analysis.search_history(trials, VAL_LOSS)["trial"].to_pylist()
    assert 3 not in analysis.dose_response(trials, VAL_LOSS)["trial"].to_pylist()
    assert 3 not in analysis.condensation_runs(trials, VAL_LOSS)["trial"].to_pylist()
    assert 3 not in analysis.costs(trials)["trial"].to_pylist()
    assert 3 not in analysis.parallel_coordinates(trials, VAL_LOSS)[0]["trial"].to_pylist()
    sentence = history_panel(trials, VAL_LOSS).sentence
    assert "saw different numbers of tokens and do not compare: 1 of 3 trials" in sentence
    assert "all that are drawn saw 204,800" in sentence


def test_a_baseline_of_another_budget_is_not_drawn() -> None:
    trials = trial_table([trial_row(0, num_tokens=100), trial_row(1), trial_row(2)])
    panel = history_panel(trials, VAL_LOSS)
    assert "baseline" not in marks(panel, "history")
    assert "The baseline saw another number of tokens and is not drawn." in panel.sentence
    assert "dashed line" not in panel.sentence


# --- the search ----------------------------------------------------------------------------------------


def test_each_arm_has_its_own_running_best(armed: Any) -> None:
    drawn = marks(history_panel(armed.trials, VAL_LOSS), "history")
    rows = [row for row in armed.trials.to_pylist() if row["phase"] == "search"]
    for arm in ("baseline", "dispersion", "noisy"):
        own = [row["val_loss"] for row in rows if row["arm"] == arm]
        assert drawn[arm].y == own
        assert drawn[f"best so far: {arm}"].y == np.minimum.accumulate(own).tolist()
    assert (
        drawn["baseline's best"].y == [min(row["val_loss"] for row in rows if row["arm"] == "baseline")] * 2
    )


def test_the_dose_response_has_the_baselines_seeds_and_the_confirmed_arms(armed: Any) -> None:
    for objective, stem in ((VAL_LOSS, "dose"), (COSINE, "dose-layer-cosine-mean")):
        panel = dose_panel(armed.trials, objective, first=objective is VAL_LOSS)
        drawn = marks(panel, f"{stem}-weight")
        seeds = confirmed(armed, "baseline", objective.metric)
        assert (drawn["baseline's seeds"].low, drawn["baseline's seeds"].high) == (min(seeds), max(seeds))
        star, ours = drawn["confirmed"], confirmed(armed, "dispersion", objective.metric)
        assert star.x == [0.8]
        assert star.y == [pytest.approx(np.mean(ours))]
        half = 2.5706 * np.std(ours, ddof=1) / math.sqrt(6)  # t of 5 degrees of freedom at 97.5 %
        assert star.y_ends[0] == pytest.approx((np.mean(ours) - half, np.mean(ours) + half), rel=1e-4)
        assert "6 fresh seeds" in panel.sentence
        assert "Without dispersion, so not drawn: noisy." in panel.sentence
        points = [x for name in ("all", "last", "early_half", "late_half") for x in drawn[name].x]
        weights = [
            row["dispersion.weight"]
            for row in armed.trials.to_pylist()
            if (row["phase"], row["arm"]) == ("search", "dispersion")
        ]
        assert sorted(points) == sorted(weights)


def test_one_confirm_seed_has_neither_band_nor_interval(armed: Any) -> None:
    rows = [row for row in armed.trials.to_pylist() if row["phase"] == "search" or row["seed"] == 101]
    table = pa.Table.from_pylist(rows, schema=armed.trials.schema)
    drawn = marks(dose_panel(table, VAL_LOSS), "dose-weight")
    assert "baseline's seeds" not in drawn
    assert drawn["confirmed"].y_ends == [(None, None)]


def test_the_surface_passes_through_a_plane() -> None:
    rows = [trial_row(0)]
    for trial, (weight, temperature) in enumerate(
        itertools.product((0.01, 0.1, 1.0), (0.1, 0.5, 2.0, 4.0)), 1
    ):
        loss = 5 + 0.1 * math.log(weight) - 0.2 * math.log(temperature)
        dose = {"dispersion.weight": weight, "dispersion.temperature": temperature}
        rows.append(trial_row(trial, val_loss=loss, **dose))
    surface = analysis.dose_surface(trial_table(rows), VAL_LOSS).to_pylist()
    known = [row for row in surface if row["value"] is not None]
    assert len(known) > 0.9 * len(surface)
    for row in known:
        assert row["value"] == pytest.approx(
            5 + 0.1 * math.log(row["weight"]) - 0.2 * math.log(row["temperature"]), abs=1e-9
        )


@pytest.mark.parametrize(
    "doses",
    [
        [(0.1 * n, 1.0) for n in range(1, 20)],  # one temperature
        [(0.1 * n, 0.1 * n) for n in range(1, 20)],  # a line
        [(0.1, 1.0), (0.2, 2.0)] * 10,  # two points
        [(-0.1 * n, 1.0 + n) for n in range(1, 20)],  # no logarithm
    ],
)
def test_no_surface_without_enough_points(doses: list[tuple[float, float]]) -> None:
    rows = [
        trial_row(trial, **{"dispersion.weight": weight, "dispersion.temperature": temperature})
        for trial, (weight, temperature) in enumerate(doses, 1)
    ]
    panel = surface_panel(trial_table(rows), VAL_LOSS)
    assert not panel.plots
    assert "it needs 10 comparable trials" in panel.sentence


def test_fields_side_by_side() -> None:
    rows = [trial_row(0), *(trial_row(trial) for trial in range(1, 8))]
    rows[3] |= {"dispersion.temperature": None}
    places, labels = analysis.parallel_coordinates(trial_table(rows), VAL_LOSS)
    by_field: dict[str, dict[int, Any]] = {}
    for row in places.to_pylist():
        by_field.setdefault(row["name"], {})[row["trial"]] = row["place"]
    losses = np.array([row["val_loss"] for row in rows[1:]])
    expected = (losses - losses.min()) / (losses.max() - losses.min())
    assert list(by_field["val_loss"].values()) == pytest.approx(expected.tolist())
    weights = np.log([row["dispersion.weight"] for row in rows[1:]])
    scaled = (weights - weights.min()) / (weights.max() - weights.min())
    assert list(by_field["dispersion.weight"].values()) == pytest.approx(scaled.tolist())
    assert by_field["dispersion.temperature"][3] is None
    choices = [row["text"] for row in labels.to_pylist() if row["name"] == "dispersion.layers"]
    assert choices == ["all", "early_half", "last", "late_half"]
    drawn = marks(parallel_panel(trial_table(rows), VAL_LOSS), "parallel")
    lines = [*drawn["other trials"].y, *drawn["best trial"].y]
    assert len(lines) == 7 * 5 - 1, "a line passes by the field that its trial did not have"
    assert lines.count(None) == 7


def test_importance_finds_the_field_that_matters_and_says_why_not() -> None:
    rows = [trial_row(trial) for trial in range(60)]
    table = analysis.importance(trial_table(rows), VAL_LOSS).to_pylist()
    evaluators = ["PED-ANOVA", *(["fANOVA"] if has_fanova() else [])]
    assert list(dict.fromkeys(row["evaluator"] for row in table)) == evaluators
    for evaluator in evaluators:
        own = [row for row in table if row["evaluator"] == evaluator]
        assert own[0]["name"] == "dispersion.weight"
        assert sum(row["importance"] for row in own) == pytest.approx(1.0)
        assert all(0 <= row["low_90"] <= row["high_90"] <= 1 for row in own)
    assert table == analysis.importance(trial_table(rows), VAL_LOSS).to_pylist(), "it repeats itself"
    panel = importance_panel(trial_table(rows), VAL_LOSS)
    assert {*marks(panel, "importance-0")} == {*evaluators}
    assert ("fANOVA, circles" in panel.sentence) == has_fanova()
    assert ("pip install 'raydisp[importance]'" in panel.sentence) != has_fanova()
    few = importance_panel(trial_table(rows[:10]), VAL_LOSS)
    assert (few.plots, few.sentence) == ([], "No figure: 9 comparable trials, fewer than 10.")
    assert "arms" not in importance_panel(trial_table(rows[:11]), VAL_LOSS).sentence


def test_importance_of_conditional_and_odd_fields() -> None:
    searched = {**SEARCHED, "train.compile": pa.bool_(), "model.num_layers": pa.int64()}
    rows = [
        trial_row(trial)
        | {"train.compile": bool(trial % 2), "model.num_layers": 2 + trial % 3}
        | ({"dispersion.temperature": None} if trial % 4 == 0 else {})
        for trial in range(30)
    ]
    found = analysis.importance(trial_table(rows, searched), Objective(metric="val_loss", mode="max"))
    assert {*found["name"].to_pylist()} == {*searched}
    of_trees = {row["name"] for row in found.to_pylist() if row["evaluator"] == "fANOVA"}
    assert of_trees == ({*searched} - {"dispersion.temperature"} if has_fanova() else set())
    equal = [row | {"val_loss": 5.0} for row in rows]
    found = analysis.importance(trial_table(equal, searched), VAL_LOSS)
    assert {*found["evaluator"].to_pylist()} == {"PED-ANOVA"}, "of equal values there are no trees"


def test_fanova_is_what_optuna_says() -> None:
    """Importance of a function whose variance is known: 4 of 5 parts from one field, 1 from the other."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install 'raydisp[importance]'")
    draw = np.random.default_rng(0)
    rows = [trial_row(0)]
    for trial in range(1, 201):
        weight, temperature = (float(value) for value in draw.uniform(1, 2, 2))
        doses = {"dispersion.weight": weight, "dispersion.temperature": temperature}
        rows.append(trial_row(trial, val_loss=5 + 2 * weight + temperature, **doses))
    found = analysis.importance(trial_table(rows), VAL_LOSS).to_pylist()
    shares = {row["name"]: row for row in found if row["evaluator"] == "fANOVA"}
    assert shares["dispersion.weight"]["importance"] == pytest.approx(0.8, abs=0.05)
    assert shares["dispersion.temperature"]["importance"] == pytest.approx(0.2, abs=0.05)
    for row in shares.values():
        assert row["low_90"] < row["importance"] < row["high_90"]


def test_the_front_is_drawn_at_equal_tokens(armed: Any) -> None:
    panel = front_panel(armed.trials, tuple(OBJECTIVES))
    drawn = marks(panel, "front-0")
    front = analysis.pareto_front(armed.trials, *OBJECTIVES)
    assert sorted(zip(drawn["Pareto front"].x, drawn["Pareto front"].y, strict=True)) == sorted(
        zip(front["val_loss"].to_pylist(), front["layer_cosine_mean"].to_pylist(), strict=True)
    )
    assert len(drawn["trial"].x) + front.num_rows == 20


# --- training ------------------------------------------------------------------------------------------


def test_learning_curves_are_means_of_the_steps() -> None:
    tables = sample_studies.small()
    rows = analysis.learning_curves(tables, VAL_LOSS).to_pylist()
    steps = tables.steps.to_pylist()
    for trial in (0, 5, 7):
        for measure in ("lm_loss", "dispersion_loss", "grad_norm"):
            own = [row for row in rows if (row["trial"], row["measure"]) == (trial, measure)]
            expected = [row for row in steps if row["trial"] == trial and row[measure] is not None]
            assert [row["value"] for row in own] == [row[measure] for row in expected]
            assert [row["num_tokens"] for row in own] == [row["num_tokens"] for row in expected]
    assert {row["kind"] for row in rows} == {"baseline", "best", "pruned", "other"}
    evals = [row for row in rows if row["measure"] == "val_loss" and row["trial"] == 7]
    expected = [row["value"] for row in tables.evals.to_pylist() if row["trial"] == 7 and row["step"] > 0]
    assert [row["value"] for row in evals] == expected
    panel = curves_panel(tables, VAL_LOSS)
    assert "A cross ends the line of a pruned trial." in panel.sentence
    ends = marks(panel, "curve-lm-loss")["stopped here"]
    assert ends.x == [25 * sample_studies.TOKENS_PER_STEP] * 2


def test_the_best_of_each_arm_has_a_curve_of_its_own(armed: Any) -> None:
    panel = curves_panel(armed, VAL_LOSS)
    drawn = marks(panel, "curve-lm-loss")
    steps = armed.steps.to_pylist()
    search = [row for row in armed.trials.to_pylist() if row["phase"] == "search"]
    looks = set()
    for arm in ("dispersion", "noisy"):
        best = min((row for row in search if row["arm"] == arm), key=lambda row: row["val_loss"])
        losses = [row["lm_loss"] for row in steps if row["trial"] == best["trial"]]
        assert drawn[f"best: {arm}"].y[:-1] == pytest.approx(losses, rel=1e-5)
        end = drawn[f"end of best: {arm}"]
        assert end.y == pytest.approx(losses[-1:], rel=1e-5)
        looks.add((end.colour, end.symbol))
    assert len(looks) == 2
    assert "The bold lines are the best of each arm" in panel.sentence


def test_of_many_trials_the_curves_say_how_many_are_drawn() -> None:
    """Failed trials have no curve: fewer lines than there may be are drawn, and it is said all the same."""
    tables = sample_studies.many(300)
    panel = curves_panel(tables, VAL_LOSS)
    drawn = {row["trial"] for row in analysis.learning_curves(tables, VAL_LOSS).to_pylist()}
    assert len(drawn) <= MAX_CURVES
    assert f" Drawn: {len(drawn)} of 301 trials, " in panel.sentence
    assert "Drawn:" not in curves_panel(sample_studies.small(), VAL_LOSS).sentence


def test_labels_lie_on_a_ground_where_they_belong() -> None:
    texts = Texts([0.1, 10.0], [0.0, 1.0], ["<b>low</b>", "high"])
    chart = Chart(Axis("x", log=True, ends=(0.01, 100)), Axis("y"), [texts])
    told = draw(chart).to_plotly_json()["layout"]["annotations"]
    assert [(one["x"], one["y"]) for one in told] == [(-1, 0), (1, 1)]
    assert [one["text"] for one in told] == ["&lt;b&gt;low&lt;/b&gt;", "high"]
    assert {one["bgcolor"] for one in told} <= set(DARK_COLOURS), "the page's script exchanges it"


@pytest.mark.parametrize("number", [1, 99, 100, 101, 1234])
def test_thinning_keeps_the_mean_and_the_end(number: int) -> None:
    tokens, values = np.arange(1, number + 1) * 7, np.random.default_rng(0).normal(size=number)
    at, means = thin(tokens, values)
    assert len(at) <= MAX_CURVE_POINTS
    assert at[-1] == tokens[-1]
    size = math.ceil(number / MAX_CURVE_POINTS)
    assert means == pytest.approx([values[i : i + size].mean() for i in range(0, number, size)])


def test_attempts_of_a_lane_do_not_overlap() -> None:
    tables = sample_studies.many(60, curves=False)
    rows = analysis.time_line(tables.attempts).to_pylist()
    assert len(rows) == 61
    lanes: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for row in rows:
        lanes.setdefault((row["hostname"], row["lane"]), []).append((row["start_s"], row["end_s"]))
    for spans in lanes.values():
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(sorted(spans)))
    drawn = marks(time_line_panel(tables), "time-line")
    bars = sum(len(mark.x) // 3 for name, mark in drawn.items() if name in ("completed", "pruned", "failed"))
    assert bars == 61


def test_costs_are_of_the_confirm_phase_where_there_is_one(armed: Any) -> None:
    panel = cost_panel(armed.trials)
    drawn = marks(panel, "cost-train")
    assert sorted(drawn["one run"].x) == [100.0] * 6 + [112.0] * 12
    assert drawn["median"].x == [100.0, 112.0, 112.0]
    assert "confirm phase" in panel.sentence
    rows = [row for row in armed.trials.to_pylist() if row["phase"] == "search"]
    assert len(marks(cost_panel(trial_table(rows)), "cost-train")["one run"].x) == 30


# --- condensation --------------------------------------------------------------------------------------


def test_condensation_over_training_draws_every_layer() -> None:
    tables = sample_tables()
    panel = trend_panel(tables, VAL_LOSS)
    rows = [row for row in tables.layers.to_pylist() if row["trial"] == 0]
    for layer in range(7):
        own = [row for row in rows if row["layer"] == layer]
        mark = marks(panel, "trend-0")[f"layer {layer}"]
        assert (mark.x, mark.y) == ([r["num_tokens"] for r in own], [r["cosine_mean"] for r in own])
    assert panel.plots[0].chart.y.ends == panel.plots[1].chart.y.ends


def test_log_spaced_evaluations_are_drawn_on_a_log_axis(tmp_path: Path) -> None:
    tokens = [0, 1024, 4096, 16_384, 204_800]
    evaluate = {"every_tokens": None, "num_log_spaced": 4}
    rows = [trial_row(trial, config_json=json.dumps({"evaluate": evaluate})) for trial in range(3)]
    tables = sample_tables(rows)
    layers = [
        {"trial": trial, "step": seen // 1024, "num_tokens": seen, "layer": layer, "cosine_mean": value}
        for trial in range(3)
        for layer in range(7)
        for seen, value in zip(tokens, (0.0, 0.05, 0.2, 0.5, 0.4 + layer / 50), strict=True)
    ]
    layers[0]["cosine_mean"] = None
    tables = dataclasses.replace(tables, layers=pa.Table.from_pylist(layers, schema=tables.layers.schema))
    panel = trend_panel(tables, VAL_LOSS)
    axis, mark = panel.plots[0].chart.x, marks(panel, "trend-0")["layer 0"]
    start = mark.x[0]
    assert axis.log
    assert mark.x[1:] == tokens[1:]
    assert 0 < axis.ends[0] < start <= 1024 / 3, "the initial weights stand apart"
    assert (start, "0") in axis.ticks
    assert (1e4, "10 k") in axis.ticks
    assert mark.hover[0] == "layer 0, initial weights: not defined"
    assert mark.hover[3] == "layer 0, 16,384 tokens: 0.500"
    assert "Leftmost, at 0: the initial weights." in panel.sentence
    assert draw(panel.plots[0].chart).layout.xaxis.type == "log"
    assert len(write_figures([panel], str(tmp_path))) == 4
    started = [row for row in layers if row["num_tokens"] > 0]
    tables = dataclasses.replace(tables, layers=pa.Table.from_pylist(started, schema=tables.layers.schema))
    panel = trend_panel(tables, VAL_LOSS)
    assert marks(panel, "trend-0")["layer 0"].x == tokens[1:]
    assert "initial weights" not in panel.sentence


def test_heat_maps_slide_through_the_evaluations() -> None:
    tables = sample_tables()
    (grid,) = heat_map_panel(tables, VAL_LOSS).plots[0].chart.marks
    assert [label for label, _ in grid.frames] == ["102 k", "205 k"]
    figure = draw(heat_map_panel(tables, VAL_LOSS).plots[0].chart)
    assert [trace.visible for trace in figure.data] == [False, True]
    assert [step.label for step in figure.layout.sliders[0].steps] == ["102 k", "205 k"]


def test_many_evaluations_are_thinned_to_the_last() -> None:
    one = [row for row in sample_tables([trial_row(0)]).layers.to_pylist() if row["step"] == 50]
    rows = [row | {"step": step, "num_tokens": step * 10} for step in range(1, 41) for row in one]
    table = pa.Table.from_pylist(rows, schema=sample_tables([]).layers.schema)
    profiles = analysis.layer_profiles(table, 0)
    steps = [profile.step for profile in profiles]
    assert (len(steps), steps[0], steps[-1]) == (6, 1, 40)


def test_condensation_against_the_loss_has_a_point_per_run(armed: Any) -> None:
    drawn = marks(against_panel(armed.trials, VAL_LOSS), "condensation-loss")
    assert len(drawn) == 6
    for arm in ("baseline", "dispersion", "noisy"):
        assert drawn[f"{arm}, confirmed"].y == confirmed(armed, arm, "val_loss")
        assert drawn[f"{arm}, confirmed"].x == confirmed(armed, arm, "layer_cosine_mean")
    about_itself = against_panel(armed.trials, COSINE)
    assert "validation loss" in about_itself.sentence


def test_one_layer() -> None:
    layers = [row for row in sample_tables().layers.to_pylist() if row["layer"] == 0]
    tables = sample_tables()
    tables = type(tables)(
        trials=tables.trials,
        attempts=tables.attempts,
        steps=tables.steps,
        evals=tables.evals,
        layers=pa.Table.from_pylist(layers, schema=tables.layers.schema),
    )
    for panel in build_panels(tables, [VAL_LOSS]):
        for plot in panel.plots:
            draw(plot.chart)


# --- the page ------------------------------------------------------------------------------------------


def test_every_figure_has_one_sentence_with_units_and_is_drawn(tmp_path: Path, armed: Any) -> None:
    study = STUDY | {"search": {"objective": [{"metric": "val_loss"}, {"metric": "layer_cosine_mean"}]}}
    made = read_page(report.build_report(sample_studies.write(tmp_path, armed, study)))
    assert {"verdict", "front-0", "dose-layer-cosine-mean-weight", "curve-val-loss"} <= set(made.figures)
    assert sum(tag == "figcaption" for tag, _ in made.tags) == sum(tag == "figure" for tag, _ in made.tags)
    for panel in build_panels(armed, OBJECTIVES):
        for plot in panel.plots:
            assert any(word in panel.sentence for word in ("unit", "in nats", "(in ", " in s ", "minutes"))
            drawn = traces(made.figures[plot.name])
            assert drawn.keys() == traces(draw(plot.chart)).keys()


def test_the_page_leads_with_the_verdicts_and_keeps_all_else(tmp_path: Path, armed: Any) -> None:
    text = Path(report.build_report(sample_studies.write(tmp_path, armed))).read_text(encoding="utf-8")
    sentences = verdict.sentences(armed.trials)
    leads = [html.unescape(lead) for lead in re.findall(r'<p class="lead">(.*?)</p>', text)]
    assert leads == [sentences[0], *verdict.verdicts(armed.trials)["sentence"].to_pylist()]
    notes = [html.unescape(note) for note in re.findall(r"<li>(.*?)</li>", text)]
    assert {*sentences} <= {*leads, *notes}
    assert text.index("What else the confirm phase says") < text.index(">Search history<")
    heads = re.sub(r"<wbr[^>]*>", "", text)
    assert "<span>test_loss</span>" in heads
    assert "<span>phase</span>" in heads


def test_results_of_version_1_still_have_a_report(tmp_path: Path) -> None:
    old = str(Path(__file__).parent / "results_v1")
    made = read_page(report.build_report(old, out=str(tmp_path / "report.html")))
    assert {"history", "profile", "curve-lm-loss", "time-line"} <= {*made.figures}


def test_a_large_study_is_small_and_quick(tmp_path: Path) -> None:
    place = sample_studies.write(tmp_path, sample_studies.many(2000))
    started = time.monotonic()
    page = Path(report.build_report(place))
    assert time.monotonic() - started < 40  # 6 s on two idle cores; twice the promise, for busy ones
    assert page.stat().st_size < 15e6
    curves = read_page(str(page)).figures["curve-lm-loss"]
    points = sum(len(trace["x"]) for trace in curves["data"])
    assert points <= MAX_CURVES * (MAX_CURVE_POINTS + 1) + MAX_CURVES


def test_names_that_break_out_nowhere(tmp_path: Path, armed: Any) -> None:
    schema = armed.trials.schema
    rows = [
        row
        | {"study": EVIL, "hostname": EVIL}
        | ({"arm": EVIL} if row["arm"] == "noisy" and row["phase"] == "search" else {})
        for row in armed.trials.to_pylist()
    ]
    rows.append(failed_row(99, error_message="<script>alert(1)</script>") | {"train.learning_rate": 1e-3})
    table = pa.Table.from_pylist(
        [{name: row.get(name) for name in schema.names} for row in rows], schema=schema
    )
    tables = type(armed)(
        trials=table, attempts=table, steps=armed.steps, evals=armed.evals, layers=armed.layers
    )
    made = read_page(report.build_report(sample_studies.write(tmp_path, tables)))
    assert len(made.scripts) == 4
    assert "<script>alert(1)</script>" in made.text
    for figure in made.figures.values():
        texts = [trace.get("name", "") for trace in figure["data"]]
        texts += [text for trace in figure["data"] for text in trace.get("hovertext", [])]
        for axis in ("xaxis", "yaxis"):
            texts += figure["layout"][axis].get("ticktext", [])
        assert all("<" not in text.replace("<br>", "") for text in texts)
    both = comparison.render(comparison.named([("a/one", tables, {}), ("a/two", tables, {})]))
    assert "<script>alert" not in both.replace("&lt;script&gt;", "")


# --- several studies -----------------------------------------------------------------------------------


def test_studies_are_compared_with_their_own_baselines(
    tmp_path: Path, armed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    small = sample_studies.small()
    places = [
        sample_studies.write(tmp_path / "one", small),
        sample_studies.write(tmp_path / "two", armed),
        sample_studies.write(tmp_path / "empty", sample_tables([failed_row(1)])),
    ]
    out = tmp_path / "page.html"
    assert command.main([*places, "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    made = read_page(str(out))
    assert {*made.figures} == {"verdicts-0", "gain-0", "profiles"}
    best = min(row["val_loss"] for row in small.trials.to_pylist()[1:] if row["status"] == "completed")
    gains = traces(made.figures["gain-0"])["best"]["x"]
    assert gains[0] == pytest.approx(best - small.trials["val_loss"][0].as_py())
    assert len(gains) == 3
    assert "two: dispersion helps" in made.text
    assert "empty: No search trial completed" in made.text
    assert not list(tmp_path.glob("*/report.html"))


def test_a_comparison_goes_where_the_command_was_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = sample_studies.write(tmp_path / "one", sample_tables([trial_row(0), trial_row(1)]))
    other = sample_studies.write(tmp_path / "two", sample_tables([trial_row(0), trial_row(2)]))
    monkeypatch.chdir(tmp_path)
    assert command.main([place, other]) == 0
    assert (tmp_path / "comparison.html").exists()
    assert command.main([place, "--out", str(tmp_path / "elsewhere.html")]) == 0
    assert (tmp_path / "elsewhere.html").exists()
    assert not (tmp_path / "one" / "report.html").exists()


def test_a_study_that_is_named_twice_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = sample_studies.write(tmp_path / "one", sample_tables([trial_row(0), trial_row(1)]))
    monkeypatch.chdir(tmp_path)
    assert command.main([place, f"{place}/", "one"]) == 0
    assert not (tmp_path / "comparison.html").exists()
    assert (tmp_path / "one" / "report.html").exists()


@pytest.mark.parametrize(
    ("found", "names"),
    [
        ([("r/a", "x"), ("r/b", "y")], ["x", "y"]),
        ([("r/a", "x"), ("r/b", "x")], ["a", "b"]),
        ([("q/a", "x"), ("r/a", "x")], ["q/a", "r/a"]),
        ([("r/y", "x"), ("r/z", "x"), ("r/b", "y")], ["r/y", "z", "r/b"]),
        ([("q/a", "x"), ("r/a", "x"), ("r/b", "q/a")], ["q/a", "r/a", "r/b"]),
    ],
)
def test_studies_have_names_of_their_own(found: list[tuple[str, str]], names: list[str]) -> None:
    told = [
        (folder, sample_tables([trial_row(0, study=name), trial_row(1, study=name)]), {})
        for folder, name in found
    ]
    assert [study.name for study in comparison.named(told)] == names


# --- papers --------------------------------------------------------------------------------------------


def test_figures_for_papers(tmp_path: Path, armed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    study = STUDY | {"search": {"objective": [{"metric": "val_loss"}, {"metric": "layer_cosine_mean"}]}}
    place = sample_studies.write(tmp_path / "study", armed, study)
    folder = tmp_path / "figures"
    assert command.main([place, "--figures", str(folder)]) == 0
    names = {panel_plot.name for panel in build_panels(armed, OBJECTIVES) for panel_plot in panel.plots}
    files = {file.name for file in folder.iterdir()}
    assert files == {f"{name}.{ending}" for name in {*names, "verdict"} for ending in ("png", "svg")}
    assert {line.rsplit("/", 1)[-1] for line in capsys.readouterr().out.split()} == files
    for file in folder.iterdir():
        content = file.read_bytes()
        assert content.startswith(b"\x89PNG") if file.suffix == ".png" else SVG in content
    before = (folder / "history.svg").read_bytes()
    write_figures([history_panel(armed.trials, VAL_LOSS)], str(folder))
    assert (folder / "history.svg").read_bytes() == before, "the same study, the same file"
    assert not (tmp_path / "study" / "report.html").exists()


def test_paper_and_page_draw_the_same_numbers(armed: Any) -> None:
    pytest.importorskip("matplotlib")
    from raydisp.figures import paper

    for panel in (history_panel(armed.trials, VAL_LOSS), dose_panel(armed.trials, VAL_LOSS)):
        for plot in panel.plots:
            axes = paper.draw(plot).axes[0]
            lines = {line.get_label(): line for line in axes.get_lines()}
            for name, trace in traces(draw(plot.chart)).items():
                if trace.get("showlegend", True) and name:
                    np.testing.assert_allclose(lines[name].get_xdata(), trace["x"])
                    np.testing.assert_allclose(lines[name].get_ydata(), trace["y"])


def test_figures_without_matplotlib_are_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = sample_studies.write(tmp_path, sample_tables([trial_row(0), trial_row(1)]))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find(name, *rest)
    )
    assert command.main([place, "--figures", str(tmp_path / "figures")]) == 2
    error = capsys.readouterr().err
    assert "matplotlib, which is not installed" in error
    assert error.count("\n") == 1


def test_figures_are_of_one_study_that_has_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    bare = failed_row(1) | {"started_at": None, "ended_at": None}
    place = sample_studies.write(tmp_path, sample_tables([bare]))
    assert command.main([place, "--figures", str(tmp_path / "f")]) == 2
    assert "has no figure that could be drawn" in capsys.readouterr().err
    other = sample_studies.write(tmp_path / "other", sample_tables([bare]))
    assert command.main([place, other, "--figures", str(tmp_path / "f")]) == 2
    assert "one results folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["$x^2$", "_hidden", EVIL, "層の選択", "a\nb"])
def test_odd_names_on_paper(name: str) -> None:
    pytest.importorskip("matplotlib")
    from raydisp.figures import paper

    rows = [trial_row(0), *(trial_row(trial, **{"dispersion.layers": name}) for trial in range(1, 4))]
    for panel in build_panels(sample_tables(rows), [VAL_LOSS]):
        for plot in panel.plots:
            assert isinstance(plot.chart, Chart)
            paper.draw(plot).canvas.draw()


def test_json_of_a_figure_is_finite(armed: Any) -> None:
    for panel in build_panels(armed, OBJECTIVES):
        for plot in panel.plots:
            json.loads(draw(plot.chart).to_json(), parse_constant=pytest.fail)
    assert log_ticks(0.1, 1.0)
