"""Trials as a table for people, and what differs between two of them: rows in, text out."""

from __future__ import annotations

import datetime
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from raydisp.errors import RaydispError, suggest

Row = Mapping[str, Any]

LEADING = ("trial", "arm", "status", "attempt")
TRAILING = (
    "test_loss",
    "val_loss",
    "num_tokens",
    "val_bits_per_byte",
    "layer_cosine_mean",
    "spearman",
    "train_loss",
    "train_s",
)

METRICS = (
    "num_steps",
    "num_tokens",
    "num_skipped_steps",
    "train_loss",
    "val_loss",
    "val_perplexity",
    "val_bits_per_byte",
    "test_loss",
    "layer_cosine_mean",
    "spearman",
    "kendall",
    "train_s",
    "startup_s",
    "tokens_per_s",
    "peak_memory_bytes",
)
"""What a trial measured; a column of numbers that is not here is told as a setting."""

_OUTCOME = (
    "phase",
    "arm",
    "status",
    "attempt",
    "resumed_step",
    "error_type",
    "error_message",
    "note",
)
_ORIGIN = (
    "study",
    "seed",
    "data_sha256",
    "initial_weights_sha256",
    "first_batch_sha256",
    "last_batch_sha256",
    "model_revision",
    "teacher_revision",
    "code_version",
    "strategy",
    "world_size",
    "precision",
    "micro_batch_tokens",
    "device",
    "hostname",
)
_NOT_COMPARED = {
    "trial",
    "config_json",
    "study_json",
    "confirm_json",
    "packages_json",
    "config_sha256",
    "traceback",
}
"""What two trials never share, or what is told item by item."""

MIN_TEXT_WIDTH, MIN_NUMBER_WIDTH = 8, 5
GAP = "  "


class ColumnError(RaydispError):
    """A column that no trial has was asked for."""


# --- a table -------------------------------------------------------------------------------------------


def default_columns(searched: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """What is shown of trials unless columns are chosen; measures that no trial has are left out."""
    measured = [name for name in TRAILING if any(row.get(name) is not None for row in rows)]
    seeds = ["seed"] if len({row.get("seed") for row in rows}) > 1 else []  # of a confirm phase
    return [*LEADING, *seeds, *searched, *measured]


def with_settings(rows: Sequence[Row], columns: Iterable[str], known: Sequence[str]) -> list[dict[str, Any]]:
    """The rows, with a column for each setting of the trials' configuration that is asked for by its name.

    Raises:
        ColumnError: neither the rows nor their configurations have such a column.
    """
    wanted = [name for name in columns if name not in known]
    if not wanted:
        return [dict(row) for row in rows]
    settings = [flatten(_parsed(row.get("config_json"))) for row in rows]
    fields = list(dict.fromkeys(name for each in settings for name in each))
    for name in wanted:
        if name not in fields:
            allowed = [*known, *fields]
            raise ColumnError(
                f'"{name}" is no column of these trials.{suggest(name, allowed)} '
                f"The columns are {', '.join(known)}, and every field of a trial by its dotted name"
            )
    return [
        {**row, **{name: each.get(name) for name in wanted}} for row, each in zip(rows, settings, strict=True)
    ]


def sort_rows(rows: Sequence[Row], column: str, *, reverse: bool = False) -> list[Row]:
    """Sorted by a column, then by trial and attempt; rows without a value are last either way."""
    ordered = sorted(rows, key=lambda row: (row["trial"] or 0, row["attempt"] or 0))
    there = [row for row in ordered if row.get(column) is not None]
    there.sort(key=lambda row: _sort_key(row[column]), reverse=reverse)
    return [*there, *(row for row in ordered if row.get(column) is None)]


def _sort_key(value: Any) -> tuple[int, Any]:
    if isinstance(value, int | float):
        return (0, value)
    return (1, value.timestamp()) if isinstance(value, datetime.datetime) else (2, format_cell("", value))


def format_table(
    rows: Sequence[Row],
    columns: Sequence[str],
    *,
    width: int | None = None,
    to_the_right: Collection[str] = (),
) -> str:
    """Rows as aligned text, numbers to the right.

    Args:
        to_the_right: columns of text that are aligned as numbers are.
        width: of the terminal; None: as wide as it gets. What does not fit is shortened, then left out from
            the right, and the last line says so.
    """
    cells = [[format_cell(name, row.get(name)) for name in columns] for row in rows]
    numeric = [name in to_the_right or all(_is_number(row.get(name)) for row in rows) for name in columns]
    widths = [
        max(len(name), *(len(line[place]) for line in cells)) if cells else len(name)
        for place, name in enumerate(columns)
    ]
    heads = list(columns)
    shown = len(columns)
    if width is not None:
        # Text and long headings give way first, but a number is never cut.
        longest = [max((len(line[place]) for line in cells), default=0) for place in range(len(columns))]
        floors = [
            min(wide, max(most, MIN_NUMBER_WIDTH) if number else MIN_TEXT_WIDTH)
            for wide, most, number in zip(widths, longest, numeric, strict=True)
        ]
        while shown > 1 and _total(floors[:shown]) > width:
            shown -= 1
        while _total(widths[:shown]) > width:
            spare = [(widths[place] - floors[place], place) for place in range(shown)]
            most, place = max(spare)
            if most <= 0:
                break
            widths[place] -= 1
    lines = []
    for line in [heads, *cells]:
        texts = [
            _cut(text, wide, from_left=line is heads).rjust(wide)
            if right
            else _cut(text, wide, from_left=line is heads).ljust(wide)
            for text, wide, right in zip(line[:shown], widths[:shown], numeric[:shown], strict=True)
        ]
        lines.append(GAP.join(texts).rstrip())
    if shown < len(columns):
        lines.append(f"({', '.join(columns[shown:])} did not fit; --columns chooses)")
    return "\n".join(lines)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | None) and not isinstance(value, bool)


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(GAP) * max(0, len(widths) - 1)


def _cut(text: str, width: int, *, from_left: bool) -> str:
    """A dotted name keeps its end, which tells more than its beginning."""
    if len(text) <= width:
        return text
    return "…" + text[-(width - 1) :] if from_left else text[: width - 1] + "…"


def format_cell(name: str, value: Any) -> str:
    """A value for people, in one line; '-' where it is missing."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if name not in METRICS:
            return f"{value:.6g}"
        if name.endswith("_s"):
            return f"{value:.1f}"
        return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.4g}"
    if isinstance(value, datetime.datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    return " ".join(str(value).split())


def number_ranges(numbers: Sequence[int]) -> str:
    """Sorted whole numbers for people: `0 to 3, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


def to_json(row: Row, columns: Sequence[str]) -> str:
    """A row as one line of JSON; times in ISO 8601."""
    plain = {
        name: value.isoformat() if isinstance(value := row.get(name), datetime.datetime) else value
        for name in columns
    }
    return json.dumps(plain, ensure_ascii=False)


# --- a comparison --------------------------------------------------------------------------------------


def compare(left: Row, right: Row) -> list[dict[str, Any]]:
    """What differs between two trials, in order: settings, origin, outcome, measures.

    Returns:
        Items with `kind` (setting | origin | package | outcome | metric), `field`, `a`, `b`; a metric has
        `difference` too (b - a), and is there wherever one of the two has a value.
    """
    items: list[dict[str, Any]] = []

    def add(kind: str, pair: Sequence[Row], names: Iterable[str]) -> None:
        one, other = pair
        items.extend(
            {"kind": kind, "field": name, "a": one.get(name), "b": other.get(name)}
            for name in names
            if one.get(name) != other.get(name)
        )

    settings = [flatten(_parsed(row.get("config_json"))) for row in (left, right)]
    add("setting", settings, dict.fromkeys([*settings[0], *settings[1]]))
    told = {*METRICS, *_OUTCOME, *_ORIGIN, *_NOT_COMPARED, *settings[0], *settings[1]}
    # A searched field that the configuration has too is told once: the row has what was really used.
    used = [
        {name: row.get(name) for name in row if name in settings[0] or name in settings[1]}
        for row in (left, right)
    ]
    mentioned = {item["field"] for item in items}
    add("setting", used, (name for name in dict.fromkeys([*used[0], *used[1]]) if name not in mentioned))
    others = [name for name in dict.fromkeys([*left, *right]) if name not in told]
    add("origin", (left, right), _ORIGIN)
    packages = [flatten(_parsed(row.get("packages_json"))) for row in (left, right)]
    add("package", packages, dict.fromkeys([*packages[0], *packages[1]]))
    add("outcome", (left, right), [*_OUTCOME, *(name for name in others if not name.endswith("_at"))])
    for name in METRICS:
        a, b = left.get(name), right.get(name)
        if a is not None or b is not None:
            difference = b - a if a is not None and b is not None else None
            items.append({"kind": "metric", "field": name, "a": a, "b": b, "difference": difference})
    return items


def format_comparison(items: Sequence[Mapping[str, Any]], names: tuple[str, str], width: int | None) -> str:
    """The items of `compare` as text, one table for what differs and one for what was measured."""
    differing = [item for item in items if item["kind"] != "metric"]
    metrics = [item for item in items if item["kind"] == "metric"]
    blocks = []
    if differing:
        blocks.append(_block(differing, ("kind", "field"), names, width, signed=False))
    else:
        blocks.append(f"{names[0]} and {names[1]} differ in no setting, origin or outcome.")
    if metrics:
        blocks.append(_block(metrics, ("field",), names, width, signed=True))
    return "\n\n".join(blocks)


def _block(
    items: Sequence[Mapping[str, Any]],
    leading: Sequence[str],
    names: tuple[str, str],
    width: int | None,
    *,
    signed: bool,
) -> str:
    rows = []
    for item in items:
        field = item["field"]
        row = {name: item[name] for name in leading}
        for name, value in zip(names, (item["a"], item["b"]), strict=True):
            row[name] = format_cell(field, value)
        if signed:
            change = item["difference"]
            text = format_cell(field, change)
            row["difference"] = f"+{text}" if change is not None and change > 0 else text
        rows.append(row)
    columns = [*leading, *names, *(["difference"] if signed else [])]
    right = {*names, "difference"} if signed else ()
    return format_table(rows, columns, width=width, to_the_right=right)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by their dotted names; lists are leaves, written as JSON."""
    if not isinstance(tree, Mapping):
        return {}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            leaves.update(flatten(value, f"{name}."))
        else:
            leaves[name] = json.dumps(value) if isinstance(value, list | dict) else value
    return leaves


def _parsed(text: Any) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else None
    except ValueError:
        return None
