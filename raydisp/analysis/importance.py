"""Which searched fields mattered for reaching the better half of the values: Optuna's PED-ANOVA."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from raydisp.analysis.rows import Row, number, scored, searched_fields
from raydisp.search_config import Objective

MIN_TRIALS = 10
"""Trials below which an importance would be noise."""
TARGET_QUANTILE = 0.25
"""An importance is that for reaching this best part of the trials."""
NUM_RESAMPLES = 40
MAX_RESAMPLED = 200
"""Trials of a resample: more would make the report slow, fewer than there are make the intervals wide."""

IMPORTANCE_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("importance", pa.float64()),  # share of the sum over the fields
        ("low_90", pa.float64()),  # over resamples of the trials
        ("high_90", pa.float64()),
        ("num_trials", pa.int32()),
    ]
)


def importance(trials: pa.Table, objective: Objective) -> pa.Table:
    """Importance of the searched fields (IMPORTANCE_SCHEMA), largest first; empty below MIN_TRIALS trials.

    PED-ANOVA (arXiv:2304.10255) as Optuna has it: how unlike the values of a field are among the best
    TARGET_QUANTILE of the trials and among all. Its 90 % intervals are of resamples of the trials with
    replacement; trials are of one number of tokens. Fields that took one value have no importance,
    and of one field alone there is no share.

    Args:
        trials: of one arm; another arm's trials do not have the same fields.
    """
    pairs = scored(trials, objective)
    names = [
        name for name in searched_fields(trials) if len({_plain(row[name]) for row, _ in pairs} - {None}) > 1
    ]
    if len(pairs) < MIN_TRIALS or len(names) < 2:
        return IMPORTANCE_SCHEMA.empty_table()
    frozen = _frozen(pairs, names, objective)
    whole = _evaluate(frozen, names, objective)
    draw = np.random.default_rng(0)
    size = min(len(frozen), MAX_RESAMPLED)
    shares = np.array(
        [
            _evaluate([frozen[i] for i in draw.integers(len(frozen), size=size)], names, objective)
            for _ in range(NUM_RESAMPLES)
        ]
    )
    lows, highs = np.quantile(shares, [0.05, 0.95], axis=0)
    rows = [
        {
            "name": name,
            "importance": float(whole[i]),
            "low_90": float(lows[i]),
            "high_90": float(highs[i]),
            "num_trials": len(pairs),
        }
        for i, name in enumerate(names)
    ]
    rows.sort(key=lambda row: -row["importance"])  # type: ignore[operator]
    return pa.Table.from_pylist(rows, schema=IMPORTANCE_SCHEMA)


def _frozen(pairs: Sequence[tuple[Row, float]], names: Sequence[str], objective: Objective) -> list[Any]:
    """The trials as Optuna has them. The ranges are those that were tried: the rows alone tell."""
    import optuna

    kinds: dict[str, Any] = {}
    for name in names:
        values = [_plain(row[name]) for row, _ in pairs if row[name] is not None]
        numbers = [number(value) for value in values]
        if None in numbers:
            kinds[name] = optuna.distributions.CategoricalDistribution(sorted({*values}, key=str))
        else:
            low, high = min(values), max(values)
            log = low > 0 and high > 20 * low
            whole = all(isinstance(value, int) for value in values)
            of = optuna.distributions.IntDistribution if whole else optuna.distributions.FloatDistribution
            kinds[name] = of(low, high, log=log)
    found = []
    for row, value in pairs:
        params = {name: _plain(row[name]) for name in names if row[name] is not None}
        found.append(
            optuna.trial.create_trial(
                params=params, distributions={name: kinds[name] for name in params}, value=value
            )
        )
    return found


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _evaluate(frozen: Sequence[Any], names: Sequence[str], objective: Objective) -> np.ndarray:
    """[names]: shares of the importance; even where none has any."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    direction = "minimize" if objective.mode == "min" else "maximize"
    try:
        study = optuna.create_study(direction=direction)
        study.add_trials(frozen)
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=TARGET_QUANTILE)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = evaluator.evaluate(study)
    finally:
        optuna.logging.set_verbosity(before)
    values = np.array([found.get(name, 0.0) for name in names])
    total = values.sum()
    return values / total if total > 0 else np.full(len(names), 1 / len(names))
