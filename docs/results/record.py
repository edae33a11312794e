"""Tables and a picture of the recorded results, made from the Parquet rows beside this file.

    python docs/results/record.py             # after a study has added rows
    python docs/results/record.py --check     # exit status 1 where the page says something else than the rows

What stands between `<!-- rows: NAME -->` and `<!-- end -->` in README.md is replaced; the words around it are
written by hand. docs/images/ffn_width.png is drawn anew (needs matplotlib).
"""

from __future__ import annotations

import argparse
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from raydisp import results, verdict
from raydisp.config import field_of, read_config_json
from raydisp.figures import paper
from raydisp.figures.chart import Axis, Chart, Line, Panel, Plot, linear_axis, log_ticks
from raydisp.figures.condensation import short_tokens
from raydisp.figures.style import DEPTH_COLOURS, blend
from raydisp.measure.tables import read_models

HERE = Path(__file__).resolve().parent
PAGE = HERE / "README.md"
BLOCK = re.compile(r"(<!-- rows: (?P<name>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
SHOWN_STATES = (0, 1, 5, 10, 15, 20, 25, 29, 30)

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; say whether page and rows agree")
    arguments = parser.parse_args(argv)
    old = PAGE.read_text()
    new = render(old)
    if not arguments.check:
        draw_widths("gpt2_ffn_width_small", HERE.parent / "images" / "ffn_width.png")
    if old == new:
        return 0
    if arguments.check:
        print(f"{PAGE.name} and the rows beside it differ; run python docs/results/record.py")
        return 1
    PAGE.write_text(new)
    return 0


def render(page: str) -> str:
    """The page with every block made anew from its rows."""
    return BLOCK.sub(lambda found: found[1] + BLOCKS[found["name"]]().strip() + "\n" + found[3], page)


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def mean_and_spread(values: Sequence[float], form: str) -> str:
    """`mean ± standard deviation`; of one value, the value alone: one seed has no spread."""
    if len(values) == 1:
        return f"{values[0]:{form}} (n = 1)"
    return f"{statistics.mean(values):{form}} ± {statistics.stdev(values):{form.lstrip('+')}}"


def about(names: Sequence[str]) -> str:
    """One line on where rows come from: how many runs, when, which code and data."""
    rows = [row for name in names for row in results.read_tables(str(HERE / name)).trials.to_pylist()]
    done = [row for row in rows if row["status"] == "completed"]
    hours = sum(row["train_s"] or 0.0 for row in done) / 3600
    codes = sorted({row["code_version"] for row in rows if row["code_version"]})
    data = sorted({row["data_sha256"][:12] for row in rows if row["data_sha256"]})
    days = sorted({row["started_at"].date().isoformat() for row in rows})
    return (
        f"{len(done)} of {len(rows)} runs completed, {hours:.1f} hours in their training loops; "
        f"{', '.join(days)}; code {', '.join(codes)}; data {', '.join(data)}."
    )


# --- blocks ---------------------------------------------------------------------------------------------


def condensation(folder: str) -> str:
    ((model, layers),) = read_models(str(HERE / folder))
    by_layer = {row["layer"]: row for row in layers}
    rows = [
        [
            state,
            f"{by_layer[state]['cosine_mean']:.3f}",
            f"{by_layer[state]['cosine_centred_mean']:.3f}",
            f"{by_layer[state]['effective_rank']:.0f}",
        ]
        for state in SHOWN_STATES
    ]
    told = (
        f"{model['name']}: {model['num_parameters']:,} parameters, {model['num_texts']} texts, "
        f"{model['num_tokens']:,} tokens. "
        f"Spearman {model['spearman']:+.3f}, Kendall {model['kendall']:+.3f}, "
        f"mean of the last half {model['last_half_mean']:.3f} ± {model['last_half_stderr']:.3f} (standard "
        "error over texts). "
        f"{model['measure_s']:.0f} s; {model['started_at'].date().isoformat()}; code {model['code_version']}."
    )
    return told + "\n\n" + table(["hidden state", "mean cosine", "centred", "effective rank"], rows)


def judged(name: str, *, alone: bool) -> str:
    """The verdict of a confirm phase: its sentences and a table of the arms.

    Args:
        alone: whether it had the machine for itself; else its times mean nothing and count as missing.
    """
    trials = results.read_tables(str(HERE / name)).trials
    if not alone:
        column = trials.schema.get_field_index("train_s")
        missing = pa.nulls(trials.num_rows, trials.schema.field(column).type)
        trials = trials.set_column(column, trials.schema.field(column), missing)
    effects = [row for row in verdict.effects(trials).to_pylist() if row["metric"] == "test_loss"]
    means = {row["arm"]: (row["arm_mean"], row["baseline_mean"]) for row in effects}
    rows = []
    for row in verdict.verdicts(trials).to_pylist():
        arm, baseline = means.get(row["arm"], (None, None))
        rows.append(
            [
                row["arm"],
                _number(arm, ".4f"),
                _number(baseline, ".4f"),
                f"{_number(row['difference'], '+.4f')} ({_number(row['low_95'], '+.4f')}, "
                f"{_number(row['high_95'], '+.4f')})",
                f"{_number(row['holm_p_value'], '.2g')}, {_number(row['sign_flip_holm_p_value'], '.2g')}",
                f"{row['num_pairs']} of {row['num_planned']}",
                f"*{row['verdict'].replace('_', ' ')}*",
            ]
        )
    heads = [
        "arm",
        "test loss",
        "baseline's",
        "difference (95 % interval)",
        "p (Holm): t, sign flips",
        "pairs",
        "verdict",
    ]
    sentences = "\n".join(f"- {sentence}" for sentence in verdict.sentences(trials))
    return "\n\n".join([about([name]), table(heads, rows), sentences])


def course(name: str) -> str:
    """Confirm runs by arm: condensation before the first step and after the last, and the loss after it.

    Condensation is of the same validation text both times. The loss is not: the last evaluation is of the
    whole split, those before it are of `evaluate.max_tokens`.
    """
    tables = results.read_tables(str(HERE / name))
    runs = tables.trials.to_pylist()
    runs = [row for row in runs if row["phase"] == "confirm" and row["status"] == "completed"]
    evals = tables.evals.to_pylist()
    measured = {(e["trial"], e["step"], e["name"]): e["value"] for e in evals if e["split"] == "validation"}
    rows = []
    for arm in sorted({row["arm"] for row in runs}):
        group = [row for row in runs if row["arm"] == arm]
        cells = [
            mean_and_spread([measured[row["trial"], row["num_steps"] * after, what] for row in group], form)
            for what, form in (("layer_cosine_mean", "+.4f"), ("spearman", "+.3f"))
            for after in (False, True)
        ]
        loss = mean_and_spread([row["val_loss"] for row in group], ".4f")
        rows.append([arm, len(group), *cells, loss])
    heads = [
        "arm",
        "runs",
        "mean cosine before",
        "after",
        "Spearman before",
        "after",
        "validation loss after",
    ]
    return table(heads, rows)


def searched(name: str) -> str:
    """All trials of a search, best first."""
    trials = results.read_tables(str(HERE / name)).trials.to_pylist()
    rows = [
        [
            row["trial"],
            row["arm"],
            _number(row["dispersion.weight"], ".3g"),
            _number(row["dispersion.temperature"], ".3g"),
            row["dispersion.layers"] or "",
            _number(row["val_loss"], ".4f"),
            _number(row["layer_cosine_mean"], "+.3f"),
            _number(row["spearman"], "+.2f"),
        ]
        for row in sorted(trials, key=lambda row: row["val_loss"])
    ]
    heads = [
        "trial",
        "arm",
        "weight",
        "temperature",
        "layers",
        "validation loss",
        "mean cosine of the layers",
        "Spearman",
    ]
    return about([name]) + "\n\n" + table(heads, rows)


def seeds_of(prefix: str) -> list[str]:
    """Folders of a study that was repeated with other seeds: `prefix_0`, `prefix_1`, ..."""
    return sorted(folder.name for folder in HERE.glob(f"{prefix}_[0-9]"))


def widths(prefix: str) -> str:
    """Mean over seeds by MLP width and weight: loss, and condensation at initialisation and at the end."""
    names = seeds_of(prefix)
    found: dict[tuple[int, float], list[Row]] = {}
    for name in names:
        tables = results.read_tables(str(HERE / name))
        evals = tables.evals.to_pylist()
        for row in tables.trials.to_pylist():
            if row["arm"] == "baseline" or row["status"] != "completed":
                continue  # the baseline has a width of its own
            config = read_config_json(row["config_json"])
            key = (field_of(config, "model.ffn_size"), field_of(config, "dispersion.weight"))
            first = {e["name"]: e["value"] for e in evals if e["trial"] == row["trial"] and e["step"] == 0}
            peak = max(
                e["value"] for e in evals if e["trial"] == row["trial"] and e["name"] == "layer_cosine_mean"
            )
            found.setdefault(key, []).append({**row, "first": first, "peak": peak})
    rows = [
        [
            width,
            f"{weight:g}",
            len(group),
            mean_and_spread([row["val_loss"] for row in group], ".3f"),
            mean_and_spread([row["first"]["layer_cosine_mean"] for row in group], "+.3f"),
            mean_and_spread([row["peak"] for row in group], "+.3f"),
            mean_and_spread([row["layer_cosine_mean"] for row in group], "+.3f"),
            mean_and_spread([row["first"]["spearman"] for row in group], "+.2f"),
            mean_and_spread([row["spearman"] for row in group], "+.2f"),
        ]
        for (width, weight), group in sorted(found.items())
    ]
    heads = [
        "MLP width",
        "weight",
        "seeds",
        "validation loss",
        "mean cosine at initialisation",
        "its highest",
        "at the end",
        "Spearman at initialisation",
        "at the end",
    ]
    return about(names) + " Mean ± standard deviation over seeds.\n\n" + table(heads, rows)


def draw_widths(prefix: str, path: Path) -> None:
    """Mean cosine over training by MLP width, mean over seeds: dashed without dispersion, solid with it."""
    found: dict[tuple[int, float], dict[int, list[float]]] = {}
    for name in seeds_of(prefix):
        tables = results.read_tables(str(HERE / name))
        keys = {
            row["trial"]: (
                field_of(read_config_json(row["config_json"]), "model.ffn_size"),
                row["dispersion.weight"],
            )
            for row in tables.trials.to_pylist()
            if row["arm"] != "baseline" and row["status"] == "completed"
        }
        for row in tables.evals.to_pylist():
            if row["name"] == "layer_cosine_mean" and row["trial"] in keys:
                curve = found.setdefault(keys[row["trial"]], {})
                curve.setdefault(row["num_tokens"], []).append(row["value"])
    marks = []
    widths = sorted({width for width, _ in found})
    first = min(tokens for curve in found.values() for tokens in curve if tokens)
    last = max(tokens for curve in found.values() for tokens in curve)
    start = first / 2  # the initial weights stand left of the axis's first number
    for (width, weight), curve in sorted(found.items()):
        marks.append(
            Line(
                f"MLP {width}{', dispersion' if weight else ''}",
                [tokens or start for tokens in sorted(curve)],
                [statistics.mean(curve[tokens]) for tokens in sorted(curve)],
                colour=blend(DEPTH_COLOURS, widths.index(width) / (len(widths) - 1)),
                symbol="circle" if weight else "circle-open",
                dash="solid" if weight else "dash",
            )
        )
    ticks = ((start, "0"), *((tokens, short_tokens(int(tokens))) for tokens, _ in log_ticks(first, last)))
    along = Axis("tokens seen (log scale)", log=True, ends=(start / 1.3, last * 1.3), ticks=ticks)
    chart = Chart(along, linear_axis("mean cosine of the layers", 0.0, 1.0), marks)
    with tempfile.TemporaryDirectory() as folder:
        paper.write_figures([Panel("", "", [Plot(path.stem, "", chart)])], folder)
        shutil.copy(Path(folder) / path.name, path)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


BLOCKS: dict[str, Callable[[], str]] = {
    "smollm2_condensation": lambda: condensation("smollm2_condensation"),
    "smollm2_midtrain": lambda: judged("smollm2_midtrain", alone=False),
    "smollm2_midtrain_before_and_after": lambda: course("smollm2_midtrain"),
    "weight_search": lambda: searched("weight_search"),
    "verdict": lambda: judged("verdict", alone=True),
    "gpt2_ffn_width_small": lambda: widths("gpt2_ffn_width_small"),
}

if __name__ == "__main__":
    sys.exit(main())
