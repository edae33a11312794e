"""Learning curves of trials, from the table `evals`: what was measured before a trial's end."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

EVALUATED = {
    "val_loss": "loss",
    "val_perplexity": "perplexity",
    "val_bits_per_byte": "bits_per_byte",
    "layer_cosine_mean": "layer_cosine_mean",
    "spearman": "spearman",
    "kendall": "kendall",
}
"""Column of `trials` -> `name` in `evals`, on the validation split."""

Point = tuple[int, dict[str, float]]
"""Tokens, and column of `trials` -> value."""


def read_curves(evals: pa.Table, *, before_tokens: int) -> dict[int, list[Point]]:
    """Trial -> its evaluations in the order of tokens, those before training left out.

    Args:
        evals: the table, each (trial, step) once.
        before_tokens: leave out evaluations from here on: the last one of a trial sees the whole split, and
            does not compare with those before it.
    """
    columns = {name: column for column, name in EVALUATED.items()}
    wanted = evals.filter(
        pc.and_(
            pc.equal(evals["split"], "validation"),
            pc.and_(pc.greater(evals["num_tokens"], 0), pc.less(evals["num_tokens"], before_tokens)),
        )
    )
    curves: dict[int, dict[int, dict[str, float]]] = {}
    table = wanted.select(["trial", "num_tokens", "name", "value"]).to_pydict()
    rows: Iterable[tuple[Any, ...]] = zip(*table.values(), strict=True)
    for trial, num_tokens, name, value in rows:
        if name in columns and value is not None:
            curves.setdefault(trial, {}).setdefault(num_tokens, {})[columns[name]] = value
    return {trial: sorted(points.items()) for trial, points in curves.items()}


def of_metric(curve: Iterable[Point], metric: str) -> list[tuple[int, float]]:
    """(tokens, value) where the metric was measured, and is a finite number."""
    return [
        (tokens, values[metric])
        for tokens, values in curve
        if metric in values and math.isfinite(values[metric])
    ]
