"""Progress of a study on the terminal: trials done, best so far, time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from tqdm import tqdm

from raydisp.agenda import Agenda
from raydisp.config import StudyConfig
from raydisp.confirm_config import BASELINE


class Progress:
    """A bar over the tokens of all trials; plain lines, one for each trial that ends, without a terminal."""

    def __init__(self, study: StudyConfig, agenda: Agenda, *, quiet: bool, metric: str | None = None) -> None:
        """Args:
        metric: what each trial is told by; None: the objective of the search, and the best of it.
        """
        self._metric = metric or study.search.primary.metric
        self._better = None if metric is not None else min if study.search.primary.mode == "min" else max
        self._tokens_per_trial = study.num_steps * study.train.global_batch_tokens
        self._total = agenda.num_trials
        self._tokens: dict[int, int] = {}
        self._best: float | None = None
        for row in agenda.finished:
            self._take(row)
        self._done = 0
        self._started = time.monotonic()
        self._quiet = quiet
        self._bar = tqdm(
            total=self._total * self._tokens_per_trial,
            unit="tok",
            unit_scale=True,
            desc=self._description(),
            disable=quiet or not sys.stderr.isatty(),
            dynamic_ncols=True,
            smoothing=0.02,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def on_result(self, result: Mapping[str, Any]) -> None:
        """A running trial has evaluated."""
        self._advance(result["trial"], result["num_tokens"])

    def on_finished(self, row: Mapping[str, Any]) -> None:
        """A trial has ended."""
        self._take(row)
        self._done += 1
        self._advance(row["trial"], self._tokens_per_trial)
        self._bar.set_description(self._description())
        if self._quiet:
            return
        value = row.get(self._metric)
        if row["status"] == "pruned":
            told = f"stopped after {row['num_tokens']:,} of {self._tokens_per_trial:,} tokens"
        elif value is not None:
            told = f"{self._metric} {value:.4f}"
        else:
            told = row.get("error_message") or f"no {self._metric}"
        elapsed_s, tokens = time.monotonic() - self._started, sum(self._tokens.values())
        left = elapsed_s / tokens * (self._total * self._tokens_per_trial - tokens)
        tqdm.write(
            f"[{self._done}/{self._total}] trial {row['trial']} ({row['arm']}) {row['status']}: "
            f"{' '.join(told.split())[:160]}{self._told_best()}, about {_duration(left)} left",
            file=sys.stderr,
        )

    def _advance(self, trial: int, tokens: int) -> None:
        before = self._tokens.get(trial, 0)
        self._tokens[trial] = max(before, tokens)
        self._bar.update(self._tokens[trial] - before)

    def _take(self, row: Mapping[str, Any]) -> None:
        value = row.get(self._metric)
        if row["status"] != "completed" or row["arm"] == BASELINE or value is None or self._better is None:
            return
        self._best = value if self._best is None else self._better(self._best, value)

    def _told_best(self) -> str:
        return "" if self._best is None else f", best so far {self._best:.4f}"

    def _description(self) -> str:
        return f"{self._done}/{self._total} trials{self._told_best()}" if self._total else ""


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
