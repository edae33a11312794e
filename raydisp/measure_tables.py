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

from raydisp import parts, storage
from raydisp.results import write_table

if TYPE_CHECKING:
    from raydisp.measure import Measured

Row = dict[str, Any]

MODEL_SCHEMA = pa.schema(
    [
        ("name", pa.string()),  # for people
        ("model", pa.string()),  # as the command was told it; identifies the row, made absolute where local
        ("source", pa.string()),  # hub | path | gguf
        ("model_revision", pa.string()),  # commit of the hub, or sha256 of the file or folder
        ("num_parameters", pa.int64()),  # tied weights count once
        ("num_layers", pa.int32()),  # transformer blocks n; there are n + 1 hidden states
        ("hidden_size", pa.int32()),  # features
        ("max_tokens", pa.int64()),  # that a text counts with at most: as asked, or the model's positions
        ("num_texts", pa.int64()),  # measured
        ("num_left_out", pa.int64()),  # texts with fewer than two tokens
        ("num_tokens", pa.int64()),  # over the measured texts
        ("texts", pa.string()),  # where they are from, in words
        ("texts_sha256", pa.string()),  # of the texts as read, before tokens are cut; the same for all models
        ("spearman", pa.float64()),  # of the layer means against the layer number; null where undefined
        ("kendall", pa.float64()),  # tau-b of the same
        ("last_1_mean", pa.float64()),  # mean cosine of the last N hidden states; null where there are fewer
        ("last_2_mean", pa.float64()),
        ("last_3_mean", pa.float64()),
        ("last_4_mean", pa.float64()),
        ("last_5_mean", pa.float64()),
        ("last_half_mean", pa.float64()),  # of the last floor(S / 2) + 1 of S states, as the authors have it
        ("last_half_stderr", pa.float64()),  # over texts, as every stderr here; null for one text
        ("dtype", pa.string()),  # of the weights and hidden states: float32 | bfloat16
        ("device", pa.string()),  # cpu, or the GPU's name
        ("load_s", pa.float64()),  # reading the model
        ("measure_s", pa.float64()),  # all forward passes and measures
        ("code_version", pa.string()),
        ("packages_json", pa.string()),
        ("started_at", pa.timestamp("us", tz="UTC")),
        ("ended_at", pa.timestamp("us", tz="UTC")),
    ]
)

CONDENSATION_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("model", pa.string()),
        ("layer", pa.int32()),  # 0 is the embedding output, n is after the final norm
        ("depth_frac", pa.float64()),  # layer / n
        # Cosines between the tokens of a text have no unit; means are over all ordered pairs, then texts.
        ("cosine_mean", pa.float64()),
        ("cosine_stderr", pa.float64()),
        ("cosine_centred_mean", pa.float64()),  # after subtracting the text's mean vector
        ("cosine_centred_stderr", pa.float64()),
        ("cosine_without_first_mean", pa.float64()),  # without token 0
        ("cosine_without_first_stderr", pa.float64()),
        ("cosine_p05", pa.float64()),  # of all pairs of all texts, good to one bin
        ("cosine_p50", pa.float64()),
        ("cosine_p95", pa.float64()),
        ("effective_rank", pa.float64()),  # 1 to min(tokens, features)
        ("effective_rank_stderr", pa.float64()),
        ("histogram", pa.list_(pa.int64())),  # counts of every pair in 128 equal bins on [-1, 1]
        ("averaged_histogram", pa.list_(pa.int64())),  # of the matrices averaged over texts first; or null
    ]
)

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
