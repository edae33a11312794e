"""What the tables on disk hold: every column with its Arrow type, its unit and what it means.

The Arrow schemas are made of these, and so is the reference in the documentation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import pyarrow as pa


class Column(NamedTuple):
    """A column of a table on disk."""

    type: pa.DataType
    meaning: str
    """For people, in Markdown; where it may be null, what that says."""
    unit: str = ""
    """Empty: it has none."""


Columns = Mapping[str, Column]
"""The columns of a table by name, in their order."""


def make_schema(columns: Columns) -> pa.Schema:
    """The Arrow schema of a table."""
    return pa.schema([(name, column.type) for name, column in columns.items()])


NATS = "nats per token"
TIMESTAMP = pa.timestamp("us", tz="UTC")

_TRIAL = Column(pa.int32(), "number of the trial")
_ATTEMPT = Column(pa.int32(), "the attempt that wrote the row")
_NUM_TOKENS = Column(pa.int64(), "seen so far", "tokens")

TRIALS: Columns = {
    "study": Column(pa.string(), "name of the study"),
    "phase": Column(pa.string(), "`search` or `confirm`"),
    "trial": Column(pa.int32(), "number of the trial, from 0; confirm runs come after those of the search"),
    "attempt": Column(pa.int32(), "from 1; the one with the highest number counts"),
    "arm": Column(
        pa.string(),
        "name of the arm; `baseline` or `search` in the search of a study without arms; `baseline` or the "
        "name of a frozen arm in the confirm phase",
    ),
    "status": Column(
        pa.string(),
        "`completed`; `pruned`: stopped by the scheduler; `failed`; `diverged`: loss or gradient not finite; "
        "`interrupted`: also a trial that is running",
    ),
    "seed": Column(pa.int64(), "of initial weights, order of the data, dropout and noise"),
    "config_json": Column(pa.string(), "all fields of the trial, as JSON"),
    "study_json": Column(pa.string(), "the whole study file, resolved, as JSON"),
    "confirm_json": Column(
        pa.string(), "the plan frozen before the first confirm run, as JSON; null in the search phase"
    ),
    "config_sha256": Column(pa.string(), "the trial's identity: hash of the fields that change its result"),
    "num_steps": Column(pa.int64(), "optimiser steps really done", "steps"),
    "num_tokens": Column(pa.int64(), "really seen", "tokens"),
    "num_skipped_steps": Column(
        pa.int64(), "of `num_steps`: not used, because the gradient was not finite", "steps"
    ),
    "resumed_step": Column(pa.int64(), "the step that this attempt went on from; 0: it began anew", "steps"),
    "train_loss": Column(
        pa.float64(),
        "cross-entropy alone, mean over the last tenth of the steps; null of a stopped trial",
        NATS,
    ),
    "val_loss": Column(
        pa.float64(),
        "cross-entropy on the whole validation split at the end; null of a stopped trial, whose evaluations "
        "are in `evals`",
        NATS,
    ),
    "val_perplexity": Column(pa.float64(), "exp(`val_loss`)"),
    "val_bits_per_byte": Column(
        pa.float64(), "the same per byte of text: compares across tokenizers", "bits per byte"
    ),
    "test_loss": Column(pa.float64(), "cross-entropy on the whole test split; confirm phase only", NATS),
    "layer_cosine_mean": Column(
        pa.float64(), "mean over layers 1..n of the mean cosine between the tokens of a sequence"
    ),
    "spearman": Column(
        pa.float64(), "rank correlation of the layer means with the layer number 0..n; null where undefined"
    ),
    "kendall": Column(pa.float64(), "tau-b of the same"),
    "train_s": Column(pa.float64(), "the loop over all attempts: steps, evaluations, checkpoints", "s"),
    "startup_s": Column(pa.float64(), "from the trial's start to its first step", "s"),
    "tokens_per_s": Column(pa.float64(), "of the training steps alone, in this attempt", "tokens/s"),
    "peak_memory_bytes": Column(
        pa.int64(), "of one worker: CUDA's peak, else the process's resident peak", "bytes"
    ),
    "world_size": Column(pa.int32(), "workers that trained together"),
    "strategy": Column(pa.string(), "`ddp` or `fsdp`"),
    "precision": Column(pa.string(), "as resolved: `fp32`, `bf16` or `fp16`"),
    "micro_batch_tokens": Column(
        pa.int64(), "per forward pass of one worker; null where none was made", "tokens"
    ),
    "device": Column(pa.string(), "`cpu`, or the name of the GPU"),
    "hostname": Column(pa.string(), "of all hosts of the trial's workers"),
    "data_sha256": Column(pa.string(), "of the content of the corpus"),
    "initial_weights_sha256": Column(pa.string(), "before the first step; confirm phase only"),
    "first_batch_sha256": Column(
        pa.string(), "token ids of the first step, over all workers; confirm phase only"
    ),
    "last_batch_sha256": Column(pa.string(), "token ids of the last step; confirm phase only"),
    "model_revision": Column(
        pa.string(), "commit of a model of the hub, hash of a local one; null from scratch"
    ),
    "teacher_revision": Column(pa.string(), "the same of `distillation.teacher`; null without one"),
    "code_version": Column(pa.string(), "of raydisp, with the commit of its checkout where there is one"),
    "packages_json": Column(pa.string(), "versions of Python and the packages that matter, as JSON"),
    "error_type": Column(pa.string(), "class of the error that ended the trial; null where none did"),
    "error_message": Column(pa.string(), "its sentence"),
    "traceback": Column(pa.string(), "where it was raised"),
    "note": Column(
        pa.string(), "what a reader should know of an attempt that otherwise looks like any other"
    ),
    "started_at": Column(TIMESTAMP, "start of the attempt"),
    "ended_at": Column(TIMESTAMP, "its end; null while it runs"),
}
"""Columns of `trials`, without those of the searched fields, which are named by their dotted path, stand
after `seed` and are typed by the field: float64, int64, bool, or string (a list of layers as JSON)."""

STEPS: Columns = {
    "trial": _TRIAL,
    "attempt": _ATTEMPT,
    "step": Column(pa.int64(), "steps done: 1 is after the first", "steps"),
    "num_tokens": _NUM_TOKENS,
    "loss": Column(
        pa.float64(),
        "what was optimised: (1 - `distillation.weight`) x `lm_loss` + `distillation.weight` x "
        "`distillation_loss` + `dispersion_weight` x `dispersion_loss`",
    ),
    "lm_loss": Column(pa.float64(), "cross-entropy of the global batch", NATS),
    "dispersion_loss": Column(
        pa.float64(), "mean over the chosen layers, unweighted; null where the weight is 0"
    ),
    "dispersion_weight": Column(pa.float64(), "in this step, as `dispersion.schedule` has it"),
    "distillation_loss": Column(
        pa.float64(), "T² KL(teacher, student), unweighted; null without a teacher", NATS
    ),
    "grad_norm": Column(pa.float64(), "global norm of the gradient before clipping"),
    "learning_rate": Column(
        pa.float64(), "of the step; with active forgetting, of all weights but the input embeddings"
    ),
    "elapsed_s": Column(pa.float64(), "training time since the trial's first step, over its attempts", "s"),
}

EVALS: Columns = {
    "trial": _TRIAL,
    "attempt": _ATTEMPT,
    "step": Column(pa.int64(), "steps done: 0 is before training", "steps"),
    "num_tokens": _NUM_TOKENS,
    "split": Column(pa.string(), "`validation`, `test`, or `tasks` for benchmarks"),
    "name": Column(
        pa.string(),
        "`loss`, `perplexity`, `bits_per_byte`, `layer_cosine_mean`, `spearman` or `kendall`; of benchmarks "
        "`<task>/<metric>`, as `piqa/acc_norm`, with the harness's filter behind a comma where the task has "
        "one",
    ),
    "value": Column(pa.float64(), "of the measure", "the measure's"),
    "num_items": Column(
        pa.int64(), "predicted tokens for losses, sequences for condensation, items of a benchmark"
    ),
    "stderr": Column(
        pa.float64(),
        "standard error over sequences, or items of a benchmark; null where it is not defined",
        "the measure's",
    ),
}

LAYERS: Columns = {
    "trial": _TRIAL,
    "attempt": _ATTEMPT,
    "step": Column(pa.int64(), "steps done: 0 is before training", "steps"),
    "num_tokens": _NUM_TOKENS,
    "layer": Column(pa.int32(), "0 is the embedding output, n the last block after the final norm"),
    "cosine_mean": Column(
        pa.float64(),
        "mean cosine over all ordered pairs of a sequence's tokens, i = j included, then sequences",
    ),
    "cosine_centred_mean": Column(pa.float64(), "the same after subtracting each sequence's mean vector"),
    "cosine_p05": Column(pa.float64(), "5 % of all pairs have a lower cosine; good to one bin"),
    "cosine_p50": Column(pa.float64(), "the median pair; good to one bin"),
    "cosine_p95": Column(pa.float64(), "95 % of all pairs have a lower cosine; good to one bin"),
    "effective_rank": Column(
        pa.float64(),
        "exponential of the entropy of the normalised singular values of a sequence's tokens, 1 to "
        "min(tokens, features); mean over sequences",
    ),
    "histogram": Column(pa.list_(pa.int64()), "counts of the cosines in 128 equal bins on [-1, 1]", "pairs"),
}

ITEMS: Columns = {
    "trial": _TRIAL,
    "attempt": _ATTEMPT,
    "step": Column(pa.int64(), "steps done: 0 is before training", "steps"),
    "num_tokens": _NUM_TOKENS,
    "benchmark": Column(pa.string(), "what the study file names: a task, or the group that it belongs to"),
    "metric": Column(pa.string(), "of the benchmark's value: `<benchmark>/<metric>` in `evals`"),
    "higher_is_better": Column(pa.bool_(), "of the metric; null where the harness does not say"),
    "task": Column(pa.string(), "of the harness"),
    "item": Column(pa.int64(), "place in the task's data, from 0"),
    "value": Column(
        pa.float64(),
        "score, whose weighted mean the metric is; of a perplexity, which is exp of the mean, nats per unit "
        "(word, byte); null where the metric is no such mean",
        "the metric's",
    ),
    "weight": Column(pa.float64(), "units of the item (words, bytes); 1 where all items count alike"),
    "content": Column(pa.int64(), "hash of document, prompt and answer: the same where the items are"),
}
