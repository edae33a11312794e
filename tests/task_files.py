"""Tasks of lm-evaluation-harness over JSON lines, in the small language of `conftest`: no network."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from conftest import WORDS

CHOICE, OTHER_CHOICE, TEXT, WORD, SPOKEN = (
    "small_choice",
    "small_other",
    "small_text",
    "small_word",
    "small_say",
)
GROUP, TAG = "small_group", "small_tag"
NUM_ITEMS = {CHOICE: 23, OTHER_CHOICE: 9, TEXT: 7, WORD: 11, SPOKEN: 5}
"""More and fewer than batches and workers divide."""

METRICS = {
    "acc": {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    "acc_norm": {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    "exact_match": {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True},
    "perplexity": {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
    **{
        name: {"metric": name, "aggregation": "weighted_perplexity", "higher_is_better": False}
        for name in ("word_perplexity", "byte_perplexity")
    },
    "bits_per_byte": {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
}


def _words(source: random.Random, number: int) -> str:
    return " ".join(source.choice(WORDS) for _ in range(number))


def _lines(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def _choices(folder: Path, name: str, seed: int) -> dict[str, Any]:
    source = random.Random(seed)
    files = {}
    for split, number in (("train", 6), ("validation", NUM_ITEMS[name])):
        rows = [
            {
                "question": _words(source, 3),
                "choices": [_words(source, source.randint(1, 2)) for _ in range(3)],
                "answer": source.randrange(3),
            }
            for _ in range(number)
        ]
        files[split] = _lines(folder / f"{name}-{split}.jsonl", rows)
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "output_type": "multiple_choice",
        "training_split": "train",
        "validation_split": "validation",
        "fewshot_split": "train",
        "doc_to_text": "question",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [METRICS["acc"], METRICS["acc_norm"]],
        "tag": TAG,
    }


def _texts(folder: Path, name: str, output_type: str, metrics: list[str], **fields: Any) -> dict[str, Any]:
    source = random.Random(name)
    rows = [
        {"text": _words(source, source.randint(5, 40)), "start": _words(source, 4), "end": _words(source, 1)}
        for _ in range(NUM_ITEMS[name])
    ]
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": _lines(folder / f"{name}.jsonl", rows)}},
        "output_type": output_type,
        "test_split": "test",
        "metric_list": [METRICS[metric] for metric in metrics],
        **fields,
    }


def write_task(folder: Path, config: dict[str, Any]) -> None:
    """One YAML file, named after its task or group."""
    name = config.get("group") or config["task"]
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def write_tasks(folder: Path) -> Path:
    """A folder with a task of each kind, and a group."""
    folder.mkdir(parents=True, exist_ok=True)
    rolling = ["word_perplexity", "byte_perplexity", "bits_per_byte"]
    for config in (
        _choices(folder, CHOICE, 1),
        _choices(folder, OTHER_CHOICE, 2),
        _texts(folder, TEXT, "loglikelihood_rolling", rolling, doc_to_text="", doc_to_target="text"),
        _texts(
            folder,
            WORD,
            "loglikelihood",
            ["perplexity", "acc"],
            doc_to_text="start",
            doc_to_target="{{' ' + end}}",
        ),
        _texts(
            folder,
            SPOKEN,
            "generate_until",
            ["exact_match"],
            doc_to_text="start",
            doc_to_target="end",
            num_fewshot=0,
            generation_kwargs={"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        ),
        {
            "group": GROUP,
            "task": [CHOICE, OTHER_CHOICE],
            "aggregate_metric_list": [{"metric": "acc_norm", "weight_by_size": True}],
        },
    ):
        write_task(folder, config)
    return folder
