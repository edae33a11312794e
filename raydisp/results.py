"""The results on disk: column names, Arrow schemas, writing and reading.

A study's folder holds four Parquet datasets, `trials`, `steps`, `evals` and `layers`; they are the truth,
and everything else can be rebuilt from them. Files are named after what they hold, so that writing one again
replaces it and never doubles a row:

    trials/trial-00003.parquet               one row: the latest attempt
    steps/trial-00003/from-00000050.parquet  rows of steps after step 50 (evals and layers likewise)

A file appears under its name only when it is whole: it is written beside it under a name that readers skip
(`_tmp-...`), flushed to the disk, and renamed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raydisp.errors import OutputError

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
TABLES = ("trials", "steps", "evals", "layers")
STATUSES = ("completed", "failed", "diverged", "interrupted")
NUM_HISTOGRAM_BINS = 128

_timestamp = pa.timestamp("us", tz="UTC")

TRIAL_COLUMNS: dict[str, pa.DataType] = {
    "study": pa.string(),
    "phase": pa.string(),  # search
    "trial": pa.int32(),  # 0 is the baseline
    "attempt": pa.int32(),  # from 1; the row is of the latest
    "arm": pa.string(),  # baseline | search
    "status": pa.string(),  # one of STATUSES
    "seed": pa.int64(),
    "config_json": pa.string(),  # the whole TrialConfig
    "config_sha256": pa.string(),  # the trial's identity
    "num_steps": pa.int64(),  # really done
    "num_tokens": pa.int64(),  # really seen
    "train_loss": pa.float64(),  # nats per token, cross-entropy alone, mean over the last tenth of the steps
    "val_loss": pa.float64(),  # nats per token, whole validation split
    "val_perplexity": pa.float64(),
    "val_bits_per_byte": pa.float64(),
    "layer_cosine_mean": pa.float64(),  # mean over layers 1..n of the mean pairwise cosine
    "spearman": pa.float64(),  # of the layer means against the layer number, 0..n
    "kendall": pa.float64(),
    "train_s": pa.float64(),  # the loop: steps, evaluations, checkpoints
    "startup_s": pa.float64(),  # from the trial's start to its first step
    "tokens_per_s": pa.float64(),  # training steps alone
    "peak_memory_bytes": pa.int64(),  # of one worker: CUDA's peak, else the process's resident peak
    "world_size": pa.int32(),
    "strategy": pa.string(),
    "precision": pa.string(),  # resolved: fp32 | bf16
    "device": pa.string(),
    "hostname": pa.string(),
    "data_sha256": pa.string(),
    "model_revision": pa.string(),
    "code_version": pa.string(),
    "packages_json": pa.string(),
    "error_type": pa.string(),
    "error_message": pa.string(),
    "traceback": pa.string(),
    "started_at": _timestamp,
    "ended_at": _timestamp,
}
"""Columns of `trials`, without those of the searched fields, which are named by their dotted path, stand
after `seed` and are typed by the field: float64, int64, bool, or string (a list of layers as JSON)."""

STEP_SCHEMA = pa.schema(
    [
        ("trial", pa.int32()),
        ("attempt", pa.int32()),
        ("step", pa.int64()),  # steps done: 1 is after the first
        ("num_tokens", pa.int64()),
        ("loss", pa.float64()),  # lm_loss + weight x dispersion_loss
        ("lm_loss", pa.float64()),  # nats per token
        ("dispersion_loss", pa.float64()),  # unweighted; null where the weight is 0
        ("grad_norm", pa.float64()),  # before clipping
        ("learning_rate", pa.float64()),
        ("elapsed_s", pa.float64()),  # training time since the trial's first step, over its attempts
    ]
)

EVAL_SCHEMA = pa.schema(
    [
        ("trial", pa.int32()),
        ("attempt", pa.int32()),
        ("step", pa.int64()),  # 0 is before training
        ("num_tokens", pa.int64()),
        ("split", pa.string()),
        ("name", pa.string()),  # loss, perplexity, bits_per_byte, layer_cosine_mean, spearman, kendall
        ("value", pa.float64()),
        ("num_items", pa.int64()),  # predicted tokens for losses, sequences for condensation
        ("stderr", pa.float64()),  # over sequences; null where it is not defined
    ]
)

LAYER_SCHEMA = pa.schema(
    [
        ("trial", pa.int32()),
        ("attempt", pa.int32()),
        ("step", pa.int64()),
        ("num_tokens", pa.int64()),
        ("layer", pa.int32()),  # 0 is the embedding output, n is after the final norm
        ("cosine_mean", pa.float64()),
        ("cosine_centred_mean", pa.float64()),
        ("cosine_p05", pa.float64()),
        ("cosine_p50", pa.float64()),
        ("cosine_p95", pa.float64()),
        ("effective_rank", pa.float64()),
        ("histogram", pa.list_(pa.int64())),  # NUM_HISTOGRAM_BINS counts of pairwise cosines on [-1, 1]
    ]
)

_TRIAL_SCHEMA_METADATA = {b"raydisp.schema_version": str(SCHEMA_VERSION).encode()}


def trial_schema(searched: Mapping[str, pa.DataType]) -> pa.Schema:
    """Schema of `trials` for a study that searches these fields.

    Args:
        searched: dotted field name -> Arrow type, in the order of the study file.
    """
    fields: list[tuple[str, pa.DataType]] = []
    for name, kind in TRIAL_COLUMNS.items():
        fields.append((name, kind))
        if name == "seed":
            fields.extend(searched.items())
    return pa.schema(fields)
