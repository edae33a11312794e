"""The tables of `raydisp.measure`: one file per model, so that measuring a model again replaces its rows.

    models/<model>.parquet         one row: what was measured, on what, and how it condenses with depth
    condensation/<model>.parquet   one row per hidden state

A model counts once its row in `models` is there; it is written last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from raydisp import storage
from raydisp.results import parts, write_table
from raydisp.results.columns import TIMESTAMP, Column, Columns, make_schema

if TYPE_CHECKING:
    from raydisp.measure import Measured

Row = dict[str, Any]

MODEL_COLUMNS: Columns = {
    "name": Column(pa.string(), "for people"),
    "model": Column(
        pa.string(), "as the command was told it, made absolute where it is local; identifies the row"
    ),
    "source": Column(pa.string(), "`hub`, `path` or `gguf`"),
    "model_revision": Column(pa.string(), "commit of the hub, or SHA-256 of the file or folder"),
    "num_parameters": Column(pa.int64(), "tied weights count once"),
    "num_layers": Column(pa.int32(), "transformer blocks n; there are n + 1 hidden states"),
    "hidden_size": Column(pa.int32(), "features of a hidden state"),
    "max_tokens": Column(
        pa.int64(), "that a text counts with at most: as asked, or the model's positions", "tokens"
    ),
    "num_texts": Column(pa.int64(), "measured"),
    "num_left_out": Column(pa.int64(), "texts with fewer than two tokens"),
    "num_tokens": Column(pa.int64(), "over the measured texts", "tokens"),
    "texts": Column(pa.string(), "where they are from, in words"),
    "texts_sha256": Column(
        pa.string(), "of the texts as read, before tokens are cut; the same for all models"
    ),
    "spearman": Column(
        pa.float64(), "rank correlation of the layer means with the layer number; null where undefined"
    ),
    "kendall": Column(pa.float64(), "tau-b of the same"),
    **{
        f"last_{count}_mean": Column(
            pa.float64(),
            "mean cosine of the last hidden state"
            if count == 1
            else f"of the last {count} hidden states; null where there are fewer",
        )
        for count in range(1, 6)
    },
    "last_half_mean": Column(
        pa.float64(), "of the last floor(S / 2) + 1 of S hidden states, as the paper's authors have it"
    ),
    "last_half_stderr": Column(pa.float64(), "standard error over texts; null for one text"),
    "dtype": Column(pa.string(), "of the weights and hidden states: `float32` or `bfloat16`"),
    "device": Column(pa.string(), "`cpu`, or the name of the GPU"),
    "load_s": Column(pa.float64(), "reading the model", "s"),
    "measure_s": Column(pa.float64(), "all forward passes and measures", "s"),
    "code_version": Column(pa.string(), "of raydisp, with the commit of its checkout where there is one"),
    "packages_json": Column(pa.string(), "versions of Python and the packages that matter, as JSON"),
    "started_at": Column(TIMESTAMP, "start of the measurement"),
    "ended_at": Column(TIMESTAMP, "its end"),
}
MODEL_SCHEMA = make_schema(MODEL_COLUMNS)

CONDENSATION_COLUMNS: Columns = {
    "name": Column(pa.string(), "of the model, for people"),
    "model": Column(pa.string(), "as in `models`"),
    "layer": Column(pa.int32(), "0 is the embedding output, n the last block after the final norm"),
    "depth_frac": Column(pa.float64(), "layer / n"),
    "cosine_mean": Column(
        pa.float64(), "mean cosine over all ordered pairs of a text's tokens, i = j included, then texts"
    ),
    "cosine_stderr": Column(pa.float64(), "its standard error over texts, as every stderr here"),
    "cosine_centred_mean": Column(pa.float64(), "the same after subtracting the text's mean vector"),
    "cosine_centred_stderr": Column(pa.float64(), "its standard error"),
    "cosine_without_first_mean": Column(pa.float64(), "the same without token 0"),
    "cosine_without_first_stderr": Column(pa.float64(), "its standard error"),
    "cosine_p05": Column(pa.float64(), "5 % of all pairs of all texts have a lower cosine; good to one bin"),
    "cosine_p50": Column(pa.float64(), "the median pair; good to one bin"),
    "cosine_p95": Column(pa.float64(), "95 % of all pairs have a lower cosine; good to one bin"),
    "effective_rank": Column(
        pa.float64(),
        "exponential of the entropy of the normalised singular values of a text's tokens, 1 to min(tokens, "
        "features)",
    ),
    "effective_rank_stderr": Column(pa.float64(), "its standard error"),
    "histogram": Column(pa.list_(pa.int64()), "counts of the cosines in 128 equal bins on [-1, 1]", "pairs"),
    "averaged_histogram": Column(
        pa.list_(pa.int64()),
        "counts of the cosine matrices averaged over texts first, as the paper's figures have it, or null",
        "pairs",
    ),
}
CONDENSATION_SCHEMA = make_schema(CONDENSATION_COLUMNS)

SCHEMAS = {"models": MODEL_SCHEMA, "condensation": CONDENSATION_SCHEMA}


def file_name(name: str, model: str, source: str) -> str:
    """The name of a model's files; those of local models carry a hash of their place: names repeat."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "-", name.replace("/", "--")).strip(".-_")[:100] or "model"
    # A name with signs that a file cannot have, or a leading underscore, must not fall on another's.
    if source == "hub" and "--" not in name and plain == name.replace("/", "--"):
        return f"{plain}.parquet"
    return f"{plain}-{hashlib.sha256(model.encode()).hexdigest()[:8]}.parquet"


def model_row(about: Mapping[str, Any], measured: Measured) -> Row:
    """The row of a model: what the caller knows of it, and the measures."""
    lasts = {f"last_{count}_mean": value for count, value in enumerate(measured.last_means, start=1)}
    found = {field.name: getattr(measured, field.name) for field in dataclasses.fields(measured)}
    row = {**found, **about, **lasts}
    return {name: _null_if_not_finite(row[name]) for name in MODEL_SCHEMA.names}


def condensation_rows(name: str, model: str, measured: Measured) -> list[Row]:
    """One row per hidden state."""
    num_layers = len(measured.cosine_mean) - 1
    columns = CONDENSATION_SCHEMA.names[4:]
    return [
        {
            "name": name,
            "model": model,
            "layer": layer,
            "depth_frac": layer / max(num_layers, 1),
            **{column: _at(getattr(measured, column), layer) for column in columns},
        }
        for layer in range(num_layers + 1)
    ]


def _at(values: list[Any] | None, layer: int) -> Any:
    return None if values is None else _null_if_not_finite(values[layer])


def _null_if_not_finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_model(folder: str, row: Row, rows: list[Row]) -> None:
    """Write a model's rows, each file whole or not at all; those of an earlier measurement are replaced.

    Raises:
        OutputError: they cannot be written.
    """
    file = file_name(row["name"], row["model"], row["source"])
    place = storage.join(folder, "models", file)
    storage.delete_file(place)  # interrupted in between, the model is missing and not a mixture
    table = pa.Table.from_pylist(rows, schema=CONDENSATION_SCHEMA)
    write_table(storage.join(folder, "condensation", file), table)
    write_table(place, pa.Table.from_pylist([row], schema=MODEL_SCHEMA))


def read_models(folder: str) -> list[tuple[Row, list[Row]]]:
    """(model's row, its condensation rows by layer) of every model measured into a folder, smallest first.

    A file that is not whole, or not ours, is named in a warning and left out.
    """
    found = []
    for file in storage.list_files(storage.join(folder, "models"), recursive=False):
        tables = []
        for name, schema in SCHEMAS.items():
            place = storage.join(folder, name, file)
            try:
                table = parts.read_part(place, schema)
            except FileNotFoundError:
                parts.leave_out(storage.join(folder, "models", file), f"{place} is not there")
                table = None
            tables.append(table)
        models, layers = tables
        if models is None or layers is None:
            continue
        if models.num_rows != 1 or layers.num_rows == 0:
            parts.leave_out(storage.join(folder, "models", file), "it does not hold one model and its layers")
            continue
        found.append((models.to_pylist()[0], layers.sort_by("layer").to_pylist()))
    return sorted(found, key=lambda one: (one[0]["num_parameters"] or 0, one[0]["name"] or ""))
