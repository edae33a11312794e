"""The page of a report: tables and figures -> one HTML text that needs nothing but itself.

Plotly's JavaScript is in it, and its content security policy forbids every request. Its style, script and
frame are `page.css`, `page.js` and the `.html` files beside this one.
"""

from __future__ import annotations

import dataclasses
import datetime
import html
import importlib.resources
import json
import logging
import math
import string
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.offline
import pyarrow as pa
from pydantic import ValidationError

from raydisp import analysis, verdict
from raydisp.analysis import MEASURES, Row
from raydisp.config.search import Objective
from raydisp.confirm.frozen_plan import CONFIRM
from raydisp.errors import VerdictError
from raydisp.figures import Panel, Plot, benchmark_panel, build_panels, verdict_panel
from raydisp.figures.interactive import draw
from raydisp.figures.style import DARK_COLOURS
from raydisp.results import Tables
from raydisp.tasks import effects as task_effects

logger = logging.getLogger(__name__)


def facts(trials: pa.Table, study: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was run: pairs of a name and a plain text, those that are known."""
    search = analysis.search_trials(trials)
    counts = ", ".join(f"{number} {status}" for status, number in analysis.count_statuses(search).items())
    planned = None if _get(study, "arms") else _get(study, "search.num_trials")
    baseline = analysis.baseline_row(trials, objectives_of(study)[0])
    of_planned = f" (of {planned} planned)" if planned is not None and planned != search.num_rows else ""
    state = "no baseline yet" if baseline is None else f"baseline {baseline['status']}"
    tokens = sorted({number for number in trials["num_tokens"].to_pylist() if number is not None})
    span = " to ".join(f"{number:,}" for number in dict.fromkeys([tokens[0], tokens[-1]])) if tokens else ""
    pairs = [
        ("model", _model_text(study)),
        ("data", _data_text(study)),
        ("tokens per trial", span),
        ("trials", f"{counts or 'none yet'}{of_planned}; {state}"),
        ("seed", _distinct(trials, "seed")),
        ("device", _distinct(trials, "device")),
        ("when", _when(trials)),
        ("code version", _distinct(trials, "code_version")),
    ]
    return [(name, text) for name, text in pairs if text]


def _get(study: Mapping[str, Any], dotted: str) -> Any:
    node: Any = study
    for part in dotted.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _model_text(study: Mapping[str, Any]) -> str:
    model = _get(study, "model")
    if not isinstance(model, Mapping):
        return ""
    if model.get("source") == "scratch":
        return (
            f"{model.get('family')} from scratch: {model.get('num_layers')} layers, "
            f"hidden size {model.get('hidden_size')}, {model.get('num_heads')} heads"
        )
    name = model.get("id") or model.get("path") or model.get("source")
    return f"{name} (revision {model['revision']})" if model.get("revision") else str(name)


def _data_text(study: Mapping[str, Any]) -> str:
    data = _get(study, "data")
    if not isinstance(data, Mapping):
        return ""
    paths = data.get("paths")
    parts = paths if isinstance(paths, list) else [data.get("path") or data.get("source"), data.get("name")]
    context = data.get("context_length")
    shown = ", ".join(str(part) for part in parts if part is not None)
    return f"{shown}; context of {context} tokens" if context else shown


def _distinct(trials: pa.Table, column: str) -> str:
    return ", ".join(str(value) for value in dict.fromkeys(trials[column].to_pylist()) if value is not None)


def _when(trials: pa.Table) -> str:
    started = [time for time in trials["started_at"].to_pylist() if time is not None]
    ended = [time for time in trials["ended_at"].to_pylist() if time is not None]
    if not started or not ended:
        return ""
    first, last = min(started).astimezone(datetime.UTC), max(ended).astimezone(datetime.UTC)
    end = f"{last:%H:%M}" if first.date() == last.date() else f"{last:%Y-%m-%d %H:%M}"
    return f"{first:%Y-%m-%d %H:%M} to {end} UTC"


def results_table(trials: pa.Table, objective: Objective) -> str:
    """The table of all trials as HTML, everything in it escaped; sorted by the page's script."""
    metric = objective.metric
    best, baseline = analysis.best_trial(trials, objective), analysis.baseline_row(trials, objective)
    fields = analysis.searched_fields(trials)
    confirmed = CONFIRM in trials["phase"].to_pylist()
    shown = ["val_loss", *(["test_loss"] if confirmed else [])]
    shown += ["val_bits_per_byte", "layer_cosine_mean", "spearman"]
    measures = list(dict.fromkeys([metric, *shown]))
    rows = trials.to_pylist()

    heads = [head("trial", number=True), head("arm"), head("status")]
    heads += [head("phase"), head("seed", number=True)] if confirmed else []
    heads += [head(name, number=_is_number(trials, name)) for name in fields]
    heads += [head(metric, MEASURES[metric].unit, number=True), head("against baseline", number=True)]
    heads += [head(name, MEASURES[name].unit, number=True) for name in measures[1:]]
    heads += [head("num_tokens", number=True), head("train_s", "seconds", number=True)]

    body = []
    for row in rows:
        is_best = best is not None and row["trial"] == best["trial"]
        arm = html.escape(str(row["arm"])) + (' <span class="tag">best</span>' if is_best else "")
        cells = [cell(str(row["trial"]), row["trial"]), f"<td>{arm}</td>", _status_cell(row)]
        if confirmed:
            seed = row["seed"]
            cells.append(f"<td>{html.escape(str(row['phase']))}</td>")
            cells.append(cell("" if seed is None else str(seed), seed, number=True))
        cells += [
            cell(analysis.format_value(row[name]), row[name] if _is_number(trials, name) else None)
            for name in fields
        ]
        for name in measures:
            cells.append(cell(analysis.format_measure(name, row[name]), row[name], number=True))
            if name == metric:
                difference = _against_baseline(row, baseline, metric)
                text = "" if difference is None else f"{difference:+.{MEASURES[metric].digits}f}"
                cells.append(cell(text, difference, number=True))
        tokens, seconds = row["num_tokens"], row["train_s"]
        cells.append(cell("" if tokens is None else f"{tokens:,}", tokens, number=True))
        cells.append(cell("" if seconds is None else f"{seconds:.1f}", seconds, number=True))
        marks = " ".join(
            name for name, on in (("best", is_best), ("baseline", row["arm"] == "baseline")) if on
        )
        body.append(f'<tr class="{marks}">{"".join(cells)}</tr>')
    return f"<table><thead><tr>{''.join(heads)}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _is_number(trials: pa.Table, name: str) -> bool:
    kind = trials.schema.field(name).type
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _against_baseline(row: Row, baseline: Row | None, metric: str) -> float | None:
    value, reference = analysis.value_of(row, metric), analysis.value_of(baseline, metric)
    if baseline is None or value is None or reference is None or row["trial"] == baseline["trial"]:
        return None
    if row["phase"] != "search":  # of another seed: its baseline is that of its pair
        return None
    return value - reference if analysis.same_budget(row, baseline) else None


def head(name: str, unit: str = "", *, number: bool = False) -> str:
    label = html.escape(name).replace(".", ".<wbr>").replace("_", '_<wbr class="fine">')
    small = f"<small>{html.escape(unit)}</small>" if unit else ""
    kind = ' class="number"' if number else ""
    button = f'<button type="button"><span>{label}</span>{small}</button>'
    return f'<th scope="col" aria-sort="none"{kind}>{button}</th>'


def cell(text: str, value: float | None = None, *, number: bool = False) -> str:
    key = "" if value is None or not math.isfinite(value) else f' data-value="{value!r}"'
    kind = ' class="number"' if number or value is not None else ""
    return f"<td{kind}{key}>{html.escape(text)}</td>"


def _status_cell(row: Row) -> str:
    status = html.escape(str(row["status"]))
    text = ": ".join(part for part in (row["error_type"], row["error_message"]) if part)
    if not text:
        return f"<td>{status}</td>"
    if len(text) <= 120 and "\n" not in text:
        return f'<td class="error">{status}<small>{html.escape(text)}</small></td>'
    start = html.escape(text.splitlines()[0][:100])
    return (
        f'<td class="error">{status}<details><summary>{start} …</summary>'
        f"<pre>{html.escape(text)}</pre></details></td>"
    )


def render(tables: Tables, study: Mapping[str, Any]) -> str:
    """The page of one study.

    Args:
        study: the resolved study file; what it lacks is left out of the page.
    """
    trials, objectives = tables.trials, objectives_of(study)
    sentences = analysis.summarise(trials, *objectives)
    judged, benchmarks = _verdict(trials), _benchmarks(tables)
    known = "".join(
        f"<div><dt>{html.escape(key)}</dt><dd>{html.escape(text)}</dd></div>"
        for key, text in facts(trials, study)
    )
    return assemble(
        kicker="raydisp study",
        name=study_name(trials, study),
        leads=judged.leads or sentences,
        facts=f"<dl>{known}</dl>",
        panels=_panels(tables, objectives, judged, benchmarks),
        notes=_list_section("What else the confirm phase says", judged.notes),
        search=_list_section("The search that came before", sentences) if judged.leads else "",
        tables=_benchmark_section(benchmarks)
        + table_section(
            "Trials",
            results_table(trials, objectives[0]),
            "Every trial of the study; a click on a header sorts by it. Losses are cross-entropy over the "
            "whole validation split; an empty cell is a value that the trial does not have.",
        ),
        footer="Made by raydisp from the Parquet files and the study.yaml beside it, and from nothing else.",
    )


def study_panels(tables: Tables, objectives: Sequence[Objective]) -> list[Panel]:
    """All figures of a study, the verdict's first."""
    return _panels(tables, objectives, _verdict(tables.trials), _benchmarks(tables))


def _panels(
    tables: Tables, objectives: Sequence[Objective], judged: _Verdict, benchmarks: Sequence[Row]
) -> list[Panel]:
    lean = dataclasses.replace(tables, trials=analysis.without_large_texts(tables.trials))
    compared = benchmark_panel(benchmarks)
    return [
        *judged.panels,
        *([compared] if compared is not None else []),
        *build_panels(lean, objectives),
    ]


def study_name(trials: pa.Table, study: Mapping[str, Any]) -> str:
    """What the rows call the study, else what its file does."""
    names = dict.fromkeys([*trials["study"].to_pylist(), _get(study, "name")])
    return next((str(name) for name in names if name), "study")


def assemble(
    *,
    kicker: str,
    name: str,
    leads: Sequence[str],
    facts: str,
    panels: Sequence[Panel],
    notes: str = "",
    search: str = "",
    tables: str,
    footer: str,
) -> str:
    """A page from its parts.

    Args:
        kicker, name, leads, footer: plain texts.
        facts, notes, search, tables: HTML; the notes come after the first panel.
    """
    shown = [panel_html(panel) for panel in panels if panel.plots]
    return string.Template(read_part("page.html")).substitute(
        begin=begin(name),
        kicker=html.escape(kicker),
        name=html.escape(name),
        leads="".join(f'<p class="lead">{html.escape(text)}</p>' for text in leads),
        search=search,
        facts=facts,
        panels="".join([*shown[:1], notes, *shown[1:]]),
        left_out=_left_out_html([panel for panel in panels if not panel.plots]),
        tables=tables,
        footer=html.escape(footer),
        end=end(panels),
    )


def table_section(title: str, table: str, note: str) -> str:
    """A table with its heading and a note below.

    Args:
        table: HTML; the others are plain texts.
    """
    heading = html.escape(title)
    return (
        f'<section class="table"><h2>{heading}</h2>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{heading}">{table}</div>'
        f'<p class="note">{html.escape(note)}</p></section>'
    )


@dataclasses.dataclass(frozen=True)
class _Verdict:
    leads: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    """What else a reader must know."""
    panels: tuple[Panel, ...] = ()


def _verdict(trials: pa.Table) -> _Verdict:
    """What the confirm phase found; nothing where there is none."""
    if CONFIRM not in trials["phase"].to_pylist():
        return _Verdict()
    try:
        sentences, verdicts = verdict.sentences(trials), verdict.verdicts(trials)
        told = verdicts["sentence"].to_pylist()
        # What was compared, whether it is over, and each arm's verdict; the rest would bury them.
        first = sentences.index(told[0])
        return _Verdict(
            (*sentences[:first], *told),
            tuple(sentence for sentence in sentences[first:] if sentence not in told),
            (verdict_panel(verdicts, trials),),
        )
    except VerdictError as error:
        return _Verdict((f"The confirm phase cannot be judged: {error}.",))


def _benchmarks(tables: Tables) -> list[Row]:
    """Rows of `tasks.effects.benchmarks`; none where the confirm phase has none, or cannot be judged."""
    if tables.items.num_rows == 0:
        return []
    try:
        table = task_effects.benchmarks(tables.trials, tables.evals, tables.items)
    except VerdictError:  # told where the verdict would be
        return []
    rows: list[Row] = table.to_pylist()
    return rows


def _benchmark_section(rows: Sequence[Row]) -> str:
    """What the confirm phase says of benchmarks, as a table; nothing where there are none."""
    if not rows:
        return ""
    heads = [head("arm"), head("benchmark"), head("metric"), head("baseline", number=True)]
    heads += [head("difference", "arm minus baseline", number=True), head("95 % interval", "over seeds")]
    heads += [head("standard error", "over items", number=True), head("items", number=True)]
    heads += [head("pairs", number=True)]
    body = []
    for row in rows:
        low, high = row["low_95"], row["high_95"]
        cells = [
            f"<td>{html.escape(row['arm'])}</td>",
            f"<td>{html.escape(row['benchmark'])}</td>",
            f"<td>{html.escape(row['metric'] + task_effects.direction(row))}</td>",
            cell(analysis.format_value(row["baseline_mean"]), row["baseline_mean"], number=True),
            cell(_signed(row["difference"]), row["difference"], number=True),
            cell("" if low is None else f"{_signed(low)} to {_signed(high)}"),
            cell(analysis.format_value(row["items_stderr"]), row["items_stderr"], number=True),
            cell("" if row["num_items"] is None else f"{row['num_items']:,}", row["num_items"], number=True),
            cell(str(row["num_pairs"]), row["num_pairs"], number=True),
        ]
        body.append(f"<tr>{''.join(cells)}</tr>")
    return table_section(
        "Benchmarks in numbers",
        f"<table><thead><tr>{''.join(heads)}</tr></thead><tbody>{''.join(body)}</tbody></table>",
        "Of the models at the end of each pair of confirm runs; described and not tested. The interval is "
        "over seeds, on these items; the standard error is over items, paired item by item and averaged over "
        "the pairs.",
    )


def _signed(value: float) -> str:
    return f"{value:+.4g}"


def _list_section(title: str, sentences: Sequence[str]) -> str:
    """A list of plain texts under a heading; nothing where there are none."""
    if not sentences:
        return ""
    items = "".join(f"<li>{html.escape(text)}</li>" for text in sentences)
    return f'<section class="notes"><h2>{html.escape(title)}</h2><ul>{items}</ul></section>'


def objectives_of(study: Mapping[str, Any]) -> list[Objective]:
    """What the study's file says is searched for; the default where it cannot be understood."""
    found = _get(study, "search.objective") or {}
    try:
        return [Objective.model_validate(one) for one in (found if isinstance(found, list) else [found])]
    except ValidationError:
        logger.warning("study.yaml: search.objective is not understood; the report takes val_loss, min")
        return [Objective()]


def panel_html(panel: Panel) -> str:
    title = html.escape(panel.title)
    drawings = "".join(_plot_html(plot, title, alone=len(panel.plots) == 1) for plot in panel.plots)
    return (
        f'<section><h2>{title}</h2><figure><div class="drawings">{drawings}</div>'
        f"<figcaption>{html.escape(panel.sentence)}</figcaption></figure></section>"
    )


def _plot_html(plot: Plot, title: str, *, alone: bool) -> str:
    heading = "" if alone else f"<h3>{html.escape(plot.title)}</h3>"
    # As high as its lines of text need: never so low that they lie over each other.
    room = f"height: {max(12, 5 + 1.5 * plot.rows):g}rem; " if plot.rows else ""
    room += f"min-width: {6 * plot.columns:g}rem; " if plot.columns else ""
    style = f' style="{room.strip()}"' if room else ""
    box = f'<div class="wide" tabindex="0" role="region" aria-label="{title}">' if plot.columns else "<div>"
    return (
        f"{box}{heading}"
        f'<div class="plot"{style} id="{plot.name}" role="img" aria-label="{title}"></div></div>'
    )


def _left_out_html(panels: Sequence[Panel]) -> str:
    if not panels:
        return ""
    items = "".join(f"<li>{html.escape(panel.title)}. {html.escape(panel.sentence)}</li>" for panel in panels)
    return f'<section class="left-out"><h2>Left out</h2><ul>{items}</ul></section>'


def script_json(text: str) -> str:
    """JSON that a script element can hold: outside strings none of these characters occur in JSON."""
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def begin(title: str) -> str:
    """The beginning of each of our pages, up to its `main`: security policy, title and style.

    Args:
        title: plain text.
    """
    told = string.Template(read_part("begin.html")).substitute(
        title=html.escape(title), style=read_part("page.css")
    )
    return told.rstrip("\n")


def end(panels: Sequence[Panel]) -> str:
    """The end of a page with figures, from `main` on: the figures, Plotly and the script that draws them."""
    drawn = [f'"{plot.name}": {draw(plot.chart).to_json()}' for panel in panels for plot in panel.plots]
    told = string.Template(read_part("end.html")).substitute(
        figures=script_json(f"{{{', '.join(drawn)}}}"),
        dark=script_json(json.dumps(DARK_COLOURS)),
        plotly=plotly.offline.get_plotlyjs(),
        script=read_part("page.js"),
    )
    return told.rstrip("\n")


def read_part(name: str, package: str = "raydisp.report") -> str:
    """A file of markup, style or script that lies beside the modules of a package."""
    return (importlib.resources.files(package) / name).read_text(encoding="utf-8")
