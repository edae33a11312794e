"""Which searched fields mattered, by Optuna's evaluators: PED-ANOVA, and fANOVA where scikit-learn is."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from raydisp.analysis.rows import Row, number, scored, searched_fields
from raydisp.config.search import Objective

MIN_TRIALS = 10
"""Trials below which an importance would be noise."""
TARGET_QUANTILE = 0.25
"""PED-ANOVA's importance is that for reaching this best part of the trials."""
NUM_RESAMPLES = 40
MAX_RESAMPLED = 200
"""Trials of a resample: more would make the report slow, fewer than there are make the intervals wide."""
PED_ANOVA, FANOVA = "PED-ANOVA", "fANOVA"

IMPORTANCE_SCHEMA = pa.schema(
    [
        ("evaluator", pa.string()),  # PED_ANOVA | FANOVA
        ("name", pa.string()),
        ("importance", pa.float64()),  # share of the sum over the fields
        ("low_90", pa.float64()),  # over resamples of the trials
        ("high_90", pa.float64()),
        ("num_trials", pa.int32()),
    ]
)


def has_fanova() -> bool:
    """Whether Optuna's fANOVA can be had here: it needs scikit-learn, which is no dependency of raydisp."""
    return importlib.util.find_spec("sklearn") is not None


def importance(trials: pa.Table, objective: Objective) -> pa.Table:
    """Importance of the searched fields (IMPORTANCE_SCHEMA), largest first; empty below MIN_TRIALS trials.

    PED-ANOVA (arXiv:2304.10255): how unlike the values of a field are among the best TARGET_QUANTILE of the
    trials and among all. fANOVA (Hutter et al. 2014), where `has_fanova`: the part of the variance over the
    whole ranges that a field explains alone, by regression trees; fields that not every trial has are left
    out of it. The 90 % intervals are over resamples of the trials with replacement: of fANOVA each tree has
    its own, and the importance is their mean. Trials are of one number of tokens. Fields that took one value
    have no importance, and of one field alone there is no share.

    Args:
        trials: of one arm; another arm's trials do not have the same fields.
    """
    pairs = scored(trials, objective)
    names = [
        name for name in searched_fields(trials) if len({_plain(row[name]) for row, _ in pairs} - {None}) > 1
    ]
    if len(pairs) < MIN_TRIALS or len(names) < 2:
        return IMPORTANCE_SCHEMA.empty_table()
    frozen = _frozen(pairs, names)
    found = [(PED_ANOVA, names, *_by_quantile(frozen, names, objective))]
    everywhere = [name for name in names if all(row[name] is not None for row, _ in pairs)]
    if has_fanova() and len(everywhere) > 1:
        found += [(FANOVA, everywhere, *told) for told in _by_trees(frozen, everywhere, objective)]
    rows = [
        {
            "evaluator": evaluator,
            "name": name,
            "importance": float(shares[i]),
            "low_90": float(ends[0][i]),
            "high_90": float(ends[1][i]),
            "num_trials": len(pairs),
        }
        for evaluator, of, shares, ends in found
        for i, name in enumerate(of)
    ]
    rows.sort(key=lambda row: (row["evaluator"] != PED_ANOVA, -row["importance"]))  # type: ignore[operator]
    return pa.Table.from_pylist(rows, schema=IMPORTANCE_SCHEMA)


def _by_quantile(
    frozen: Sequence[Any], names: Sequence[str], objective: Objective
) -> tuple[np.ndarray, np.ndarray]:
    """[names]: PED-ANOVA's shares; [2, names]: the ends of their intervals."""
    import optuna

    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=TARGET_QUANTILE)
    whole = _evaluate(evaluator, frozen, names, objective)
    draw = np.random.default_rng(0)
    size = min(len(frozen), MAX_RESAMPLED)
    shares = [
        _evaluate(evaluator, [frozen[i] for i in draw.integers(len(frozen), size=size)], names, objective)
        for _ in range(NUM_RESAMPLES)
    ]
    return whole, np.quantile(np.array(shares), [0.05, 0.95], axis=0)


def _by_trees(
    frozen: Sequence[Any], names: Sequence[str], objective: Objective
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The same of fANOVA, in a list of one; [] where all values are equal."""
    import optuna

    draw = np.random.default_rng(0)
    shares = []
    for seed in range(NUM_RESAMPLES):
        # A forest of one tree, which draws its resample of the trials itself.
        tree = optuna.importance.FanovaImportanceEvaluator(n_trees=1, seed=seed)
        some = draw.choice(len(frozen), size=min(len(frozen), MAX_RESAMPLED), replace=False)
        try:
            shares.append(_evaluate(tree, [frozen[i] for i in some], names, objective))
        except RuntimeError:  # all values of its resample are equal
            continue
    if not shares:
        return []
    table = np.array(shares)
    return [(table.mean(axis=0), np.quantile(table, [0.05, 0.95], axis=0))]


def _frozen(pairs: Sequence[tuple[Row, float]], names: Sequence[str]) -> list[Any]:
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


def _evaluate(
    evaluator: Any, frozen: Sequence[Any], names: Sequence[str], objective: Objective
) -> np.ndarray:
    """[names]: shares of the importance; even where none has any."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    direction = "minimize" if objective.mode == "min" else "maximize"
    try:
        study = optuna.create_study(direction=direction)
        study.add_trials(frozen)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = evaluator.evaluate(study)
    finally:
        optuna.logging.set_verbosity(before)
    values = np.array([found.get(name, 0.0) for name in names])
    total = values.sum()
    return values / total if total > 0 else np.full(len(names), 1 / len(names))
