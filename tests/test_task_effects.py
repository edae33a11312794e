"""Benchmarks in the verdict: paired over seeds and over items, described and never tested."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from sample_studies import STUDY
from scipy import stats
from test_analysis import trial_table
from test_verdict import SEEDS, change, keep, plan, rows_of, shifted

from raydisp import results, storage, verdict
from raydisp.errors import VerdictError
from raydisp.figures import benchmark_panel
from raydisp.figures.paper import write_figures
from raydisp.report import build_report
from raydisp.tasks import effects as task_effects
from raydisp.verdict.command import main

QUIZ, PROSE = "quiz", "prose"
NUM_ITEMS = 40
CONFIG = json.dumps({"evaluate": {"tasks": [{"name": QUIZ}, {"name": PROSE}]}})


def confirmed(**changes: Any) -> list[dict[str, Any]]:
    """A confirm phase of two arms that was evaluated on tasks."""
    arms = {name: {"description": name} for name in ("best", "noisy")}
    tree = plan(arms=arms)
    return rows_of({"best": shifted(-0.1), "noisy": shifted(0.0)}, tree, config_json=CONFIG, **changes)


def answers(row: dict[str, Any]) -> np.ndarray:
    """Which items a run answers: the hard ones are hard for all, `best` answers some more."""
    draw = np.random.default_rng(7)
    ease = draw.normal(0, 1.5, NUM_ITEMS)
    own = np.random.default_rng(row["trial"]).normal(0, 0.4, NUM_ITEMS)
    return (ease + own + 0.6 * (row["arm"] == "best") > 0).astype(float)


def nats(row: dict[str, Any]) -> np.ndarray:
    own = np.random.default_rng(100 + row["trial"]).normal(0, 0.1, NUM_ITEMS)
    return np.linspace(2.0, 4.0, NUM_ITEMS) + own - 0.05 * (row["arm"] == "best")


WEIGHTS = np.arange(1, NUM_ITEMS + 1, dtype=float)


def measured(rows: list[dict[str, Any]]) -> tuple[pa.Table, pa.Table]:
    """`evals` and `items` of the runs, as a study writes them, at the start and at the end."""
    evals, items = [], []
    for row in rows:
        if row["phase"] != "confirm" or row["status"] != "completed":
            continue
        for step in (0, row["num_steps"]):
            at = {"trial": row["trial"], "attempt": 1, "step": step, "num_tokens": step * 4096}
            quiz, prose = (
                answers(row) if step else np.zeros(NUM_ITEMS),
                nats(row) if step else np.ones(NUM_ITEMS),
            )
            for name, value in (
                (f"{QUIZ}/acc", quiz.mean()),
                (f"{PROSE}/word_perplexity", math.exp((prose * WEIGHTS).sum() / WEIGHTS.sum())),
            ):
                evals.append(at | {"split": "tasks", "name": name, "value": value, "num_items": NUM_ITEMS})
            for benchmark, metric, higher, scores, weights in (
                (QUIZ, "acc", True, quiz, np.ones(NUM_ITEMS)),
                (PROSE, "word_perplexity", False, prose, WEIGHTS),
            ):
                items += [
                    at
                    | {
                        "benchmark": benchmark,
                        "metric": metric,
                        "higher_is_better": higher,
                        "task": benchmark,
                        "item": item,
                        "value": scores[item],
                        "weight": weights[item],
                        "content": 1000 + item,
                    }
                    for item in range(NUM_ITEMS)
                ]
    return (
        pa.Table.from_pylist(evals, schema=results.EVAL_SCHEMA),
        pa.Table.from_pylist(items, schema=results.ITEM_SCHEMA),
    )


def write(folder: Path, rows: list[dict[str, Any]], items: pa.Table | None = None) -> str:
    """A results folder with its benchmarks."""
    place = str(folder)
    evals, found = measured(rows)
    found = found if items is None else items
    for name, table in (("trials", trial_table(rows)), ("evals", evals)):
        results.write_table(storage.join(place, name, "all.parquet"), table)
    for trial in found["trial"].unique().to_pylist():
        file = storage.join(place, "items", results.trial_name(trial), "until-00000050.parquet")
        results.write_table(file, found.filter(pc.equal(found["trial"], trial)))
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY))
    return place


def effects(
    rows: list[dict[str, Any]], items: pa.Table | None = None
) -> dict[tuple[str, str], dict[str, Any]]:
    """Arm and benchmark -> row."""
    evals, found = measured(rows)
    final = found if items is None else items
    trials = trial_table(rows)
    ended = final.filter(pc.greater(final["step"], 0))
    table = task_effects.benchmarks(trials, evals, ended)
    assert table.schema == task_effects.BENCHMARK_SCHEMA
    return {(row["arm"], row["benchmark"]): row for row in table.to_pylist()}


def runs(rows: list[dict[str, Any]], arm: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["phase"] == "confirm" and row["arm"] == arm]


def test_differences_are_paired_over_seeds_and_over_items() -> None:
    rows = confirmed()
    found = effects(rows)
    assert list(found) == [(arm, name) for arm in ("best", "noisy") for name in (QUIZ, PROSE)]
    ours, theirs = (np.array([answers(row) for row in runs(rows, arm)]) for arm in ("best", "baseline"))
    row = found["best", QUIZ]
    each = ours.mean(1) - theirs.mean(1)
    interval = stats.ttest_rel(ours.mean(1), theirs.mean(1)).confidence_interval(0.95)
    assert row["difference"] == pytest.approx(each.mean())
    assert (row["low_95"], row["high_95"]) == pytest.approx((interval.low, interval.high))
    assert (row["arm_mean"], row["baseline_mean"]) == pytest.approx((ours.mean(), theirs.mean()))
    assert (row["num_pairs"], row["num_items"]) == (len(SEEDS), NUM_ITEMS)
    per_item = (ours - theirs).mean(0)
    assert row["items_stderr"] == pytest.approx(per_item.std(ddof=1) / math.sqrt(NUM_ITEMS))
    unpaired = math.sqrt(sum(one.mean(0).var(ddof=1) / NUM_ITEMS for one in (ours, theirs)))
    assert row["items_stderr"] < unpaired / 2, "hard items are hard for both"
    assert (row["metric"], row["higher_is_better"]) == ("acc", True)


def test_a_perplexity_is_paired_by_the_influence_of_its_items() -> None:
    """Against what leaving an item out of both does to the difference: the jackknife."""
    rows = confirmed()
    row = effects(rows)["best", PROSE]

    def difference(kept: np.ndarray) -> float:
        each = [
            [math.exp((nats(run) * WEIGHTS)[kept].sum() / WEIGHTS[kept].sum()) for run in runs(rows, arm)]
            for arm in ("best", "baseline")
        ]
        return float(np.mean(each[0]) - np.mean(each[1]))

    everything = np.arange(NUM_ITEMS)
    assert row["difference"] == pytest.approx(difference(everything))
    without = [difference(np.delete(everything, item)) for item in everything]
    jackknife = math.sqrt((NUM_ITEMS - 1) / NUM_ITEMS * ((without - np.mean(without)) ** 2).sum())
    assert row["items_stderr"] == pytest.approx(jackknife, rel=0.1)
    assert row["higher_is_better"] is False


@pytest.mark.parametrize("column", ["content", "item"])
def test_other_items_are_not_paired(column: str) -> None:
    """The difference stands, with its interval over seeds; its error over items is not known."""
    rows = confirmed()
    _, items = measured(rows)
    tree = items.to_pylist()
    other = runs(rows, "noisy")[2]["trial"]
    for row in tree:
        if row["trial"] == other and row["benchmark"] == QUIZ and row["item"] == 3:
            row[column] += 100
    found = effects(rows, pa.Table.from_pylist(tree, schema=results.ITEM_SCHEMA))
    assert found["noisy", QUIZ]["items_stderr"] is None
    assert found["noisy", QUIZ]["low_95"] is not None
    assert found["noisy", PROSE]["items_stderr"] > 0
    assert found["best", QUIZ]["items_stderr"] > 0


def test_items_without_scores_leave_the_difference() -> None:
    """Of a metric such as F1, which is no mean of its items."""
    rows = confirmed()
    _, items = measured(rows)
    tree = [
        {**row, "value": None, "weight": None} if row["benchmark"] == QUIZ else row
        for row in items.to_pylist()
    ]
    found = effects(rows, pa.Table.from_pylist(tree, schema=results.ITEM_SCHEMA))
    assert found["best", QUIZ]["items_stderr"] is found["best", QUIZ]["num_items"] is None
    assert found["best", QUIZ]["difference"] != 0


def test_only_complete_pairs_count() -> None:
    rows = change(confirmed(), "best", SEEDS[0], status="failed", test_loss=None)
    found = effects(rows)
    assert {key: row["num_pairs"] for key, row in found.items() if key[0] == "best"} == {
        ("best", QUIZ): 5,
        ("best", PROSE): 5,
    }
    alone = effects(keep(keep(confirmed(), "best", SEEDS[0]), "noisy"))
    assert list(alone) == [("best", QUIZ), ("best", PROSE)], "an arm without a pair has no row"
    row = alone["best", QUIZ]
    assert (row["num_pairs"], row["low_95"], row["high_95"]) == (1, None, None)


def test_without_benchmarks_there_is_nothing_to_say() -> None:
    rows = rows_of({"best": shifted(-0.1)})
    evals, items = measured([])
    table = task_effects.benchmarks(trial_table(rows), evals, items)
    assert table.num_rows == 0
    assert task_effects.sentences(table) == ()
    with pytest.raises(VerdictError, match="no run of a confirm phase"):
        task_effects.benchmarks(trial_table(rows[:2]), evals, items)


def test_the_sentences() -> None:
    rows = confirmed()
    evals, items = measured(rows)
    final = items.filter(pc.greater(items["step"], 0))
    first, best, noisy = task_effects.sentences(task_effects.benchmarks(trial_table(rows), evals, final))
    assert first.startswith("Benchmarks, arm minus baseline, described and not tested")
    row = effects(rows)["best", QUIZ]
    assert best.startswith(
        f"best: quiz (acc) {row['difference']:+.4g} (95 % interval {row['low_95']:+.4g} to "
        f"{row['high_95']:+.4g}, n = 6, standard error {row['items_stderr']:.2g} over 40 items); "
        "prose (word_perplexity, lower is better) -"
    )
    assert noisy.startswith("noisy: quiz (acc) ")
    assert "p =" not in first + best + noisy


def test_the_command_the_table_and_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = confirmed()
    place = write(tmp_path / "out", rows)
    assert main([place]) == 0
    out = capsys.readouterr().out
    tables = results.read_tables(place)
    assert {*tables.items["step"].to_pylist()} == {50}, "as the runs ended"
    table = task_effects.benchmarks(tables.trials, tables.evals, tables.items)
    assert table.to_pylist() == list(effects(rows).values())
    for sentence in (*verdict.sentences(tables.trials), *task_effects.sentences(table)):
        assert sentence in out
    assert pq.read_table(tmp_path / "out" / "benchmarks" / "benchmarks.parquet").equals(table)
    assert main([place, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["benchmarks"] == table.to_pylist()
    build_report(place)
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'id="benchmarks"' in page
    assert "Not drawn, as no share of items: prose." in page
    section = page.split("<h2>Benchmarks in numbers</h2>")[1].split("</section>")[0]
    assert section.count("<tr") == 5
    assert "word_perplexity, lower is better" in section
    plain = write(tmp_path / "plain", [row | {"config_json": "{}"} for row in rows])
    build_report(plain)
    assert "<h2>Benchmarks" not in (tmp_path / "plain" / "report.html").read_text()


def test_the_figure_has_both_errors(tmp_path: Path) -> None:
    rows = list(effects(confirmed()).values())
    panel = benchmark_panel(rows)
    assert panel is not None
    _, over_items, over_seeds = panel.plots[0].chart.marks
    quiz = [row for row in rows if row["benchmark"] == QUIZ]
    assert over_seeds.x == [100 * row["difference"] for row in quiz]
    assert over_seeds.x_ends == [(100 * row["low_95"], 100 * row["high_95"]) for row in quiz]
    halves = [(high - low) / 200 for low, high in over_items.x_ends]
    assert halves == pytest.approx([1.96 * row["items_stderr"] for row in quiz])
    assert len(write_figures([panel], str(tmp_path))) == 2, "PNG and SVG"
    assert benchmark_panel([row for row in rows if row["benchmark"] == PROSE]) is None
    assert benchmark_panel([{**row, "items_stderr": None, "low_95": None} for row in quiz]) is not None


def test_items_of_the_search_are_not_read(tmp_path: Path) -> None:
    """A search of thousands of trials has many; only the confirm phase is paired."""
    rows = confirmed()
    _, items = measured(rows)
    more = items.slice(0, 5).to_pylist()
    searched = pa.Table.from_pylist(
        [row | {"trial": 1, "step": 50} for row in more], schema=results.ITEM_SCHEMA
    )
    place = write(tmp_path, rows, pa.concat_tables([items, searched]))
    assert 1 not in results.read_tables(place).items["trial"].to_pylist()
    assert results.read_table(place, "items", trial=1).num_rows == 5
