"""A model's values on the study's tasks, as rows of `evals` and `items`.

lm-evaluation-harness makes the prompts, asks the model and averages; the same numbers as its own command
gives on the saved model. Standard errors are ours where it would draw samples for them (`scores`).
"""

from __future__ import annotations

import hashlib
import logging
import math
import numbers
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from raydisp.config import StudyConfig, TrialConfig
from raydisp.errors import TaskError
from raydisp.layers import unwrap
from raydisp.parallel import Layout
from raydisp.tasks import scores as task_scores
from raydisp.tasks.effects import SPLIT
from raydisp.tasks.loading import SHOTS_SEED, Benchmark, evaluated_steps, load, quiet, seeded

logger = logging.getLogger(__name__)

Row = dict[str, Any]

PER_UNIT = {"weighted_perplexity": 1.0, "bits_per_byte": 1 / math.log(2)}
"""Aggregations of the harness over pairs of log-likelihood and units (words, bytes) -> what a nat is in their
scores."""
PER_ITEM = {"mean": 1.0, "nanmean": 1.0, "perplexity": -1.0}
"""Aggregations over single numbers -> their sign in a score; a perplexity is made of log-likelihoods."""


@dataclass
class TaskRuns:
    """Evaluates a trial's model on its tasks, at some of its steps."""

    benchmarks: Sequence[Benchmark]
    tokenizer: Any
    steps: Collection[int]
    """After which the model is evaluated on them."""
    notes: list[str] = field(default_factory=list)
    """What a reader of the trial's row should know of them."""

    def rows(
        self, model: nn.Module, step: int, *, layout: Layout, precision: str, batch_tokens: int
    ) -> list[tuple[str, Row]]:
        """Evaluate the model, if this is one of the steps; all workers must call it.

        The model is afterwards in the mode in which it was, and so are all generators.

        Args:
            model: a causal language model, wrapped (DDP) or sharded (FSDP2).
            step: number of steps done.
            precision: fp32, bf16 or fp16, of the forward passes.
            batch_tokens: most tokens of one of them.
        Returns:
            Pairs of a table, `evals` or `items`, and a row without trial, step and tokens: on every worker
            the same.
        """
        if step not in self.steps:
            return []
        from raydisp.tasks.model import SharedModel

        plain = unwrap(model)
        was_training = plain.training
        plain.eval()
        try:
            with quiet(), seeded(layout.device), torch.no_grad():
                shared = SharedModel(
                    model, self.tokenizer, layout, precision=precision, batch_tokens=batch_tokens
                )
                found: list[tuple[str, Row]] = []
                for benchmark in self.benchmarks:
                    shared.num_cut = 0
                    found += evaluate_benchmark(benchmark, shared)
                    self._note_cut(benchmark, shared)
        finally:
            plain.train(was_training)
        return found

    def _note_cut(self, benchmark: Benchmark, shared: Any) -> None:
        if shared.num_cut:
            name, length = benchmark.name, shared.max_length
            told = f"prompts of {name} lost their beginning: the model reads {length} tokens"
            if told not in self.notes:
                self.notes.append(told)
                logger.warning("%s", told)


def of_trial(
    study: StudyConfig,
    trial: TrialConfig,
    prepared: str,
    *,
    at_rungs: bool,
    known: Sequence[str],
    notes: list[str],
) -> TaskRuns:
    """The tasks of a trial: before training, at the scheduler's rungs, and after it.

    Args:
        prepared: folder of the trial's token blocks, with its tokenizer.
        at_rungs: False: not in between.
        known: `folders` of `raydisp.tasks.loading.check` where the study was started.
        notes: gets what a reader of the trial's row should know.
    Raises:
        ConfigError: as `raydisp.tasks.loading.load`.
    """
    from raydisp.data import load_prepared_tokenizer

    return TaskRuns(
        load(trial.evaluate, known),
        load_prepared_tokenizer(prepared),
        evaluated_steps(study, trial, at_rungs=at_rungs),
        notes,
    )


def evaluate_benchmark(benchmark: Benchmark, model: Any) -> list[tuple[str, Row]]:
    """Rows of one benchmark, as `TaskRuns.rows` has them.

    Args:
        model: an LM of the harness.
    Raises:
        TaskError: the harness cannot do it.
    """
    import lm_eval

    for task in benchmark.tasks.values():
        task.set_fewshot_seed(SHOTS_SEED)  # the same examples at every evaluation, and so the same items
    try:
        outcome = lm_eval.evaluate(
            lm=model,
            task_dict=benchmark.loaded,
            limit=benchmark.entry.limit,
            bootstrap_iters=0,  # it would start processes, and draw
            log_samples=True,
        )
    # What a task's own text, data and functions come to. Errors of the device and of other workers pass.
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        told = f"{type(error).__name__}: {error}"
        raise TaskError(f"{benchmark.name} cannot be evaluated: {told}") from error
    values: dict[str, Row] = {name: dict(told) for name, told in outcome["results"].items()}
    items: list[tuple[str, Row]] = []
    for name, task in benchmark.tasks.items():
        for key in _metrics_of(values[name]):
            metric, filter_name = key.split(",", 1)
            kind = _aggregation(task, metric)
            scored = [
                _score(sample[metric], kind)
                for sample in outcome["samples"][name]
                if sample["filter"] == filter_name and metric in sample
            ]
            values[name][f"{metric}_stderr,{filter_name}"] = _standard_error(scored, values[name][key])
    main = _main_key(benchmark, values)
    for name, group in benchmark.loaded["groups"].items():
        if group.has_aggregation:
            values[name] = group.aggregate(values)  # once more, now that its tasks have standard errors
    for name, task in benchmark.tasks.items():
        items += [("items", row) for row in _items(benchmark, name, task, outcome["samples"][name], main)]
    return [("evals", row) for name in values for row in _evals(name, values[name])] + items


def _metrics_of(told: Row) -> list[str]:
    """`metric,filter` of each value of a task."""
    return [key for key, value in told.items() if "," in key and "_stderr," not in key and _is_number(value)]


def _main_key(benchmark: Benchmark, values: dict[str, Row]) -> str:
    """`metric,filter` of the benchmark's value: the first filter, where the task has several."""
    for told in values.values():
        for key in told:
            if key.split(",", 1)[0] == benchmark.metric and "," in key:
                return key
    raise ValueError(
        f"{benchmark.name} came without {benchmark.metric}: the function that scores its items gives another"
    )


def _aggregation(task: Any, metric: str) -> str:
    """Name of the function that makes a metric of its items; '' where their scores are not known to us."""
    from lm_eval.api.registry import get_aggregation

    function = task.aggregation().get(metric)
    return next((name for name in (*PER_UNIT, *PER_ITEM) if get_aggregation(name) is function), "")


def _score(raw: Any, kind: str) -> tuple[float, float] | None:
    """Score and weight of an item.

    Args:
        raw: of the harness, for a metric.
        kind: name of the metric's aggregation.
    Returns:
        None where it is not of the kinds whose items have a score of their own.
    """
    if kind in PER_UNIT and isinstance(raw, tuple | list) and len(raw) == 2 and raw[1] > 0:
        return -float(raw[0]) * PER_UNIT[kind] / float(raw[1]), float(raw[1])
    if kind in PER_ITEM and _is_number(raw):
        return PER_ITEM[kind] * float(raw), 1.0
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real | np.bool_)


def _standard_error(scored: Sequence[tuple[float, float] | None], value: float) -> float | None:
    if not scored or any(one is None for one in scored):
        return None
    scores, weights = zip(*(one for one in scored if one is not None), strict=True)
    influence = task_scores.influences(scores, weights, value)
    return None if influence is None else task_scores.standard_error(influence)


def _evals(name: str, told: Row) -> list[Row]:
    rows = []
    for key in _metrics_of(told):
        metric, filter_name = key.split(",", 1)
        stderr: Any = told.get(f"{metric}_stderr,{filter_name}")
        rows.append(
            {
                "split": SPLIT,
                "name": row_name(name, key),
                "value": float(told[key]),
                "num_items": int(told["sample_len"]),
                "stderr": float(stderr) if _is_number(stderr) else None,
            }
        )
    return rows


def row_name(task: str, key: str) -> str:
    """What `evals` calls a value: `piqa/acc_norm`, with the filter where it is not the usual one."""
    return f"{task}/{_without_usual_filter(key)}"


def _without_usual_filter(key: str) -> str:
    return key.removesuffix(",none")


def _items(benchmark: Benchmark, name: str, task: Any, samples: Sequence[Row], main: str) -> list[Row]:
    metric, filter_name = main.split(",", 1)
    kind = _aggregation(task, metric)
    rows = []
    for sample in samples:
        if sample["filter"] != filter_name:
            continue
        score = _score(sample.get(metric), kind)
        rows.append(
            {
                "benchmark": benchmark.name,
                "metric": _without_usual_filter(main),
                "higher_is_better": benchmark.higher_is_better,
                "task": name,
                "item": int(sample["doc_id"]),
                "value": None if score is None else score[0],
                "weight": None if score is None else score[1],
                "content": content_hash(sample["doc_hash"], sample["prompt_hash"], sample["target_hash"]),
            }
        )
    return sorted(rows, key=lambda row: row["item"])


def content_hash(*hashes: str) -> int:
    """The harness's hashes of an item's document, prompt and answer as one signed 64-bit number."""
    digest = hashlib.sha256("".join(hashes).encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)
