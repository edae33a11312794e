"""Condensation of trials, layer by layer: at an evaluation, over training, and against the loss."""

from __future__ import annotations

import dataclasses

import pyarrow as pa
import pyarrow.compute as pc

from raydisp.analysis.rows import compared_tokens, value_of
from raydisp.config.search import Objective
from raydisp.results import LAYER_SCHEMA, NUM_HISTOGRAM_BINS

MAX_PROFILES = 6
"""Evaluations of a trial that its heat maps show."""

TREND_SCHEMA = pa.schema(
    [LAYER_SCHEMA.field(name) for name in ("trial", "layer", "num_tokens", "cosine_mean")]
)

RUNS_SCHEMA = pa.schema(
    [
        ("trial", pa.int32()),
        ("phase", pa.string()),
        ("arm", pa.string()),
        ("seed", pa.int64()),
        ("layer_cosine_mean", pa.float64()),
        ("value", pa.float64()),
    ]
)


@dataclasses.dataclass(frozen=True)
class LayerProfile:
    """Condensation of one trial at one evaluation, layer by layer, from the embedding output up."""

    trial: int
    step: int
    layer: list[int]
    cosine_mean: list[float | None]
    histogram: list[list[int] | None]
    """Counts of pairwise cosines in NUM_HISTOGRAM_BINS equal bins on [-1, 1]."""
    num_tokens: int | None = None

    @property
    def depth_frac(self) -> list[float]:
        """Layer number over the last layer's: 0 is the embedding output, 1 is after the final norm."""
        return [number / max(self.layer[-1], 1) for number in self.layer]

    def density(self) -> list[list[float] | None]:
        """Per layer, the share of token pairs per unit of cosine; each layer integrates to 1 over [-1, 1]."""
        bin_width = 2 / NUM_HISTOGRAM_BINS
        return [
            [count / (total * bin_width) for count in counts] if counts and (total := sum(counts)) else None
            for counts in self.histogram
        ]


def layer_profile(layers: pa.Table, trial: int) -> LayerProfile | None:
    """Condensation of a trial at its last evaluation; None where it was never measured."""
    profiles = layer_profiles(layers, trial, most=1)
    return profiles[-1] if profiles else None


def layer_profiles(layers: pa.Table, trial: int, *, most: int = MAX_PROFILES) -> list[LayerProfile]:
    """Condensation of a trial at its evaluations, at `most` of them evenly chosen, the last among them."""
    rows = layers.filter(pc.equal(layers["trial"], trial)).sort_by(
        [("step", "ascending"), ("layer", "ascending")]
    )
    steps = pc.unique(rows["step"]).to_pylist()
    chosen = {steps[-1 - (len(steps) - 1) * i // max(most - 1, 1)] for i in range(most)} if steps else set()
    profiles = []
    for step in sorted(chosen):
        at = rows.filter(pc.equal(rows["step"], step))
        profiles.append(
            LayerProfile(
                trial=trial,
                step=step,
                layer=at["layer"].to_pylist(),
                cosine_mean=at["cosine_mean"].to_pylist(),
                histogram=at["histogram"].to_pylist(),
                num_tokens=at["num_tokens"][0].as_py(),
            )
        )
    return profiles


def layer_trend(layers: pa.Table, trial: int) -> pa.Table:
    """Mean cosine of each layer of a trial at each evaluation (TREND_SCHEMA), layer by layer."""
    rows = layers.filter(pc.equal(layers["trial"], trial)).select(TREND_SCHEMA.names)
    return rows.sort_by([("layer", "ascending"), ("num_tokens", "ascending")])


def condensation_runs(trials: pa.Table, objective: Objective) -> pa.Table:
    """Condensation and the metric of every completed run of equal tokens, of both phases (RUNS_SCHEMA)."""
    tokens = compared_tokens(trials, objective)
    rows = []
    for row in trials.sort_by("trial").to_pylist():
        cosine, value = value_of(row, "layer_cosine_mean"), value_of(row, objective.metric)
        if cosine is not None and value is not None and row["num_tokens"] == tokens:
            known = {name: row[name] for name in ("trial", "phase", "arm", "seed")}
            rows.append({**known, "layer_cosine_mean": cosine, "value": value})
    return pa.Table.from_pylist(rows, schema=RUNS_SCHEMA)
