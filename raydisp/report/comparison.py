"""The page that compares studies: what each found against its own baseline, and its verdicts.

Studies differ in model, data or budget, so no value of one is compared with a value of another: what stands
side by side is each study's difference from its own baseline, at that study's number of tokens.
"""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from raydisp import analysis, verdict
from raydisp.analysis import MEASURES
from raydisp.config.search import Objective
from raydisp.confirm.frozen_plan import CONFIRM
from raydisp.errors import VerdictError
from raydisp.figures.chart import Panel
from raydisp.figures.studies import gain_panel, profiles_panel, verdicts_panel
from raydisp.report import page
from raydisp.results import Tables

COMPARED_SCHEMA = pa.schema(
    [
        ("study", pa.string()),
        ("arm", pa.string()),
        ("metric", pa.string()),
        ("num_tokens", pa.int64()),  # at which the arm's best and the baseline were compared
        ("num_trials", pa.int32()),  # comparable ones of the arm
        ("baseline", pa.float64()),
        ("best_trial", pa.int32()),
        ("best", pa.float64()),
        ("difference", pa.float64()),  # best minus baseline; null where they do not compare
        ("description", pa.string()),
    ]
)


@dataclasses.dataclass(frozen=True)
class Study:
    """One of the studies that are compared."""

    name: str
    """Unique among them."""
    tables: Tables
    file: Mapping[str, Any]

    @property
    def objective(self) -> Objective:
        """The first."""
        return page.objectives_of(self.file)[0]


def named(found: Sequence[tuple[str, Tables, Mapping[str, Any]]]) -> list[Study]:
    """Studies under names that tell them apart: their own, or their folders'.

    Args:
        found: the folder, no two alike, the tables and the study file of each.
    """
    told = [
        (page.study_name(tables.trials, file), folder.rstrip("/").rsplit("/", 1)[-1], folder)
        for folder, tables, file in found
    ]
    names = [own for own, _, _ in told]
    for level in (1, 2):  # a folder's last part may be what another study is called
        names = [
            name if names.count(name) == 1 else one[level] for name, one in zip(names, told, strict=True)
        ]
    if len(set(names)) < len(names):
        names = [folder for _, _, folder in told]
    return [Study(name, tables, file) for name, (_, tables, file) in zip(names, found, strict=True)]


def compare(studies: Sequence[Study]) -> pa.Table:
    """One row per study and arm of its search (COMPARED_SCHEMA)."""
    rows = []
    for study in studies:
        trials, objective = study.tables.trials, study.objective
        metric = objective.metric
        for arm in analysis.search_arms(trials):
            own = analysis.of_arm(trials, arm)
            best = analysis.best_trial(own, objective)
            baseline = analysis.compared_baseline(own, objective)
            value = None if best is None else best[metric]
            rows.append(
                {
                    "study": study.name,
                    "arm": arm,
                    "metric": metric,
                    "num_tokens": analysis.compared_tokens(own, objective),
                    "num_trials": len(analysis.scored(own, objective)),
                    "baseline": baseline,
                    "best_trial": None if best is None else best["trial"],
                    "best": value,
                    "difference": None if value is None or baseline is None else value - baseline,
                    "description": None
                    if best is None
                    else analysis.describe_trial(best, analysis.searched_fields(trials)),
                }
            )
    return pa.Table.from_pylist(rows, schema=COMPARED_SCHEMA)


def render(studies: Sequence[Study]) -> str:
    """The page."""
    compared = compare(studies)
    judged = {study.name: rows for study in studies if (rows := _verdict_rows(study.tables.trials))}
    leads = [f"{name}: {row['sentence']}" for name, rows in judged.items() for row in rows]
    for study in studies:
        if study.name not in judged:
            leads += [f"{study.name}: {text}" for text in _summary(study)]
    panels: list[Panel] = [
        verdicts_panel(judged),
        gain_panel(compared),
        profiles_panel([(study.name, study.tables, study.objective) for study in studies]),
    ]
    return page.assemble(
        kicker="raydisp: comparison of studies",
        name=", ".join(study.name for study in studies),
        leads=leads,
        facts="",
        panels=panels,
        tables=page.table_section(
            "Studies",
            _studies_table(studies),
            "What each study ran; values of different studies do not compare unless all of this is alike.",
        )
        + page.table_section(
            "Best of each arm",
            _compared_table(compared),
            "The best search trial of each arm against its own study's baseline, at equal tokens; one seed "
            "each, so a lead and not a verdict. A click on a header sorts by it.",
        ),
        footer="Made by raydisp from the Parquet files and the study.yaml of each study, and nothing else.",
    )


def _summary(study: Study) -> tuple[str, ...]:
    found = analysis.summarise(study.tables.trials, *page.objectives_of(study.file))
    return found[:1] if len(analysis.search_arms(study.tables.trials)) < 2 else found


def _verdict_rows(trials: pa.Table) -> list[analysis.Row]:
    if CONFIRM not in trials["phase"].to_pylist():
        return []
    try:
        rows: list[analysis.Row] = verdict.verdicts(trials).to_pylist()
    except VerdictError:
        return []
    return rows


def _studies_table(studies: Sequence[Study]) -> str:
    told = [dict(page.facts(study.tables.trials, study.file)) for study in studies]
    names = list(dict.fromkeys(name for one in told for name in one))
    heads = "".join(page.head(name) for name in ["study", *names])
    body = "".join(
        f"<tr><td>{html.escape(study.name)}</td>"
        + "".join(f'<td class="long">{html.escape(one.get(name, ""))}</td>' for name in names)
        + "</tr>"
        for study, one in zip(studies, told, strict=True)
    )
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"


def _compared_table(compared: pa.Table) -> str:
    numbers = ("num_tokens", "num_trials", "baseline", "best_trial", "best", "difference")
    heads = "".join(page.head(name, number=name in numbers) for name in COMPARED_SCHEMA.names)
    body = ""
    for row in compared.to_pylist():
        digits = MEASURES[row["metric"]].digits
        cells = []
        for name in COMPARED_SCHEMA.names:
            value = row[name]
            if name in ("baseline", "best"):
                text = analysis.format_measure(row["metric"], value)
            elif name == "difference":
                text = "" if value is None else f"{value:+.{digits}f}"
            elif name == "num_tokens":
                text = "" if value is None else f"{value:,}"
            else:
                text = "" if value is None else str(value)
            if name == "description":
                cells.append(f'<td class="long">{html.escape(text)}</td>')
            else:
                cells.append(page.cell(text, value if name in numbers else None, number=name in numbers))
        body += f"<tr>{''.join(cells)}</tr>"
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
