"""The generated parts of the documentation: every field of a study file, every column of the tables.

A page has a place for each part, from `<!-- generated: NAME -->` to `<!-- end -->`; all else on it is written
by hand. What is generated is committed, and a test compares.

python -m raydisp.reference            # fill the places in all pages of docs/
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pyarrow as pa

from raydisp import studyfile, verdict
from raydisp.config.train import EFFORT_FIELDS
from raydisp.errors import EXIT_DONE, EXIT_USER_ERROR
from raydisp.measure import tables as measure_tables
from raydisp.reference.fields import Entry, Group, anchor, groups
from raydisp.results import columns
from raydisp.tasks import effects as task_effects

COMMAND = "python -m raydisp.reference"

_PLACE = re.compile(r"(<!-- generated: ([a-z ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str) -> str:
    """A page with its generated parts as the code has them now.

    Raises:
        ValueError: there is no part of a name that the page has a place for.
    """

    def generate(found: re.Match[str]) -> str:
        if found[2] not in PARTS:
            raise ValueError(f'"{found[2]}" is not a generated part; there are {", ".join(PARTS)}')
        return f"{found[1]}\n{PARTS[found[2]]()}\n\n{found[3]}"

    return _PLACE.sub(generate, text)


def pages(folder: Path) -> list[Path]:
    """The pages with generated parts."""
    return [page for page in sorted(folder.rglob("*.md")) if _PLACE.search(page.read_text())]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 a mistake of the user."""
    parser = argparse.ArgumentParser(
        prog=COMMAND, description="Fill the generated parts of the documentation."
    )
    parser.add_argument("folder", nargs="?", default="docs", type=Path, help="of the pages; default: docs")
    folder = parser.parse_args(argv).folder
    found = pages(folder)
    if not found:
        print(
            f"{folder} holds no page with a generated part; name the folder docs of a checkout",
            file=sys.stderr,
        )
        return EXIT_USER_ERROR
    for page in found:
        before = page.read_text()
        try:
            after = fill(before)
        except ValueError as error:
            print(f"{page}: {error}", file=sys.stderr)
            return EXIT_USER_ERROR
        page.write_text(after)
        print(f"{page}: {'as it was' if after == before else 'written'}")
    return EXIT_DONE


# --- tables -------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _prose(text: str) -> str:
    """Plain text as Markdown: names of fields as code, nothing else as markup."""
    text = re.sub(r"([\\*|])", r"\\\1", " ".join(text.split())).replace("<", "&lt;")
    return re.sub(r"(?<![\w.`/-])(null|[a-z0-9.]+_[a-z0-9_.]*[a-z0-9])(?![\w`/])", r"`\1`", text)


def _column_table(described: columns.Columns) -> str:
    rows = [
        [f"`{name}`", f"`{_type_name(column.type)}`", column.unit, column.meaning.replace("|", "\\|")]
        for name, column in described.items()
    ]
    return _table(["column", "type", "unit", "meaning"], rows)


def _type_name(kind: pa.DataType) -> str:
    """As DuckDB and people call it: `double` is Arrow's word for float64."""
    if pa.types.is_list(kind):
        return f"list of {_type_name(kind.value_type)}"
    return {"double": "float64", "timestamp[us, tz=UTC]": "timestamp (UTC)"}.get(str(kind), str(kind))


def _effect_metrics() -> str:
    return ", ".join(f"`{name}`" for name in verdict.EFFECT_METRICS)


# --- fields -------------------------------------------------------------------------------------------------


def _fields() -> str:
    parts, told = [], set[str]()
    for group in groups():
        parts += [*_heading(group, told), _field_table(group.entries, told)]
    return "\n\n".join(parts)


def _heading(group: Group, told: set[str]) -> list[str]:
    if not group.title:
        return ["## Without a section", _prose(group.text)]
    slug = re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", group.title))  # what the heading has anyway
    mark = _mark(anchor(group.title), told) if anchor(group.title) != slug else ""
    return [f"{'#' * (group.depth + 1)} {mark}{group.title}", _prose(group.text)]


def _mark(name: str, told: set[str]) -> str:
    """A place that links can name, where it is not there already."""
    if name in told:
        return ""
    told.add(name)
    return f'<a id="{name}"></a>'


def _field_table(entries: Sequence[Entry], told: set[str]) -> str:
    of_trial = entries[0].searched is not None
    head = ["field", "allowed", "default", "meaning", *(["searched", "identity"] if of_trial else [])]
    rows = []
    for entry in entries:
        row = [
            f"{_mark(entry.name, told)}`{entry.name}`",
            entry.allowed,
            "required" if entry.default is None else f"`{entry.default}`",
            _prose(entry.meaning),
        ]
        if of_trial:
            row += ["yes" if answer else "no" for answer in (entry.searched, entry.identity)]
        rows.append(row)
    return _table(head, rows)


def _may_change() -> str:
    whole = ", ".join(f"`{name}`" for name in studyfile.EFFORT)
    search = ", ".join(f"`search.{name}`" for name in studyfile.LENGTH_FIELDS)
    train = ", ".join(f"`train.{name}`" for name in EFFORT_FIELDS)
    return f"- the sections {whole}\n- {search}\n- {train}\n- `confirm`, until its plan is frozen"


PARTS: dict[str, Callable[[], str]] = {
    "fields": _fields,
    "what may change": _may_change,
    "trials": lambda: _column_table(columns.TRIALS),
    "steps": lambda: _column_table(columns.STEPS),
    "evals": lambda: _column_table(columns.EVALS),
    "layers": lambda: _column_table(columns.LAYERS),
    "items": lambda: _column_table(columns.ITEMS),
    "verdicts": lambda: _column_table(verdict.VERDICT_COLUMNS),
    "effects": lambda: _column_table(verdict.EFFECT_COLUMNS),
    "effect metrics": _effect_metrics,
    "benchmarks": lambda: _column_table(task_effects.BENCHMARK_COLUMNS),
    "models": lambda: _column_table(measure_tables.MODEL_COLUMNS),
    "condensation": lambda: _column_table(measure_tables.CONDENSATION_COLUMNS),
}
"""Name of a part -> what makes it."""
