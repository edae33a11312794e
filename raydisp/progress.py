"""Progress of a study on the terminal: a bar, or plain lines where there is no terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from tqdm import tqdm

from raydisp import results
from raydisp.config import StudyConfig
from raydisp.search.agenda import Agenda
from raydisp.tally import Tally, told_value

REDRAW_S = 1.0
"""How often the bar is drawn anew at the most."""

PLAIN_EVERY_S = 300.0
"""Without a terminal: a line at least this often, besides one for each trial that ends."""


class Progress:
    """Watches one phase of a study (`tally.Watcher`) and shows how it is doing.

    On a terminal a bar, renewed every second; elsewhere plain lines: one for each trial that ends, and one
    every five minutes. Nothing at all where it is to be quiet.
    """

    def __init__(
        self,
        study: StudyConfig,
        agenda: Agenda,
        *,
        quiet: bool,
        metric: str | None = None,
        places: int = 1,
        reached: Mapping[int, int] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        metric: what each trial is told by; None: the objective of the search, and the best of it.
        places: trials that run at a time.
        reached: tokens that interrupted trials have seen already.
        now: seconds by a clock.
        """
        primary = study.search.primary
        self.tally = Tally(
            tokens_per_trial=study.num_steps * study.train.global_batch_tokens,
            tokens_per_step=study.train.global_batch_tokens,
            finished=agenda.finished,
            to_come={
                **dict.fromkeys([*agenda.fixed, *(row["trial"] for row in agenda.resumed), *agenda.new], 0),
                **(reached or {}),
            },
            places=places,
            metric=metric or primary.metric,
            better=None if metric is not None else min if primary.mode == "min" else max,
            never_stopped=agenda.fixed,
            max_tokens_total=study.search.max_tokens_total if metric is None else None,
        )
        self._full = study.num_steps * study.train.global_batch_tokens
        self._now = now
        self._quiet = quiet
        self._drawn_at = now()
        self._bar = tqdm(
            total=1.0,
            desc=self.tally.line(self._drawn_at),
            bar_format="{percentage:3.0f}%|{bar:16}| {desc}",
            disable=quiet or not _draws(),
            dynamic_ncols=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def started(self, trial: int) -> None:
        self.tally.started(trial, self._now())
        self._draw()

    def reported(self, result: Mapping[str, Any]) -> None:
        self.tally.reported(result["trial"], result["num_tokens"], self._now())
        self._draw()

    def stopped(self, trial: int) -> None:
        self.tally.stopped(trial, self._now())
        self._draw()

    def finished(self, row: Mapping[str, Any]) -> None:
        self.tally.ended(row, self._now())
        self._write(
            f"[{self.tally.num_ended}/{self.tally.num_trials}] trial {row['trial']} ({row['arm']}) "
            f"{row['status']}: {self._told(row)}; "
        )
        self._draw()

    def tick(self) -> None:
        now = self._now()
        if now - self._drawn_at < (PLAIN_EVERY_S if self._bar.disable else REDRAW_S):
            return
        if self._bar.disable:
            self._write(f"[{self.tally.num_ended}/{self.tally.num_trials}] ")
        self._draw()

    def _told(self, row: Mapping[str, Any]) -> str:
        value = row.get(self.tally.metric)
        if row["status"] == "pruned":
            return f"stopped after {row['num_tokens']:,} of {self._full:,} tokens"
        if value is not None:
            return f"{self.tally.metric} {told_value(value)}"
        message = row.get("error_message") or f"no {self.tally.metric}"
        return " ".join(message.split())[:160]

    def _write(self, start: str) -> None:
        if self._quiet:
            return
        self._drawn_at = self._now()
        # Above the bar, which says the rest; where there is none, all in one line.
        text = start.rstrip("; ") if not self._bar.disable else start + self.tally.line(self._drawn_at)
        tqdm.write(text, file=sys.stderr)

    def _draw(self) -> None:
        if self._bar.disable:
            return
        self._drawn_at = self._now()
        self._bar.n = self.tally.frac()
        self._bar.set_description_str(self.tally.line(self._drawn_at), refresh=True)


def _draws() -> bool:
    """Whether a bar can be drawn: on a terminal, and one that has a size, which not all have."""
    if not sys.stderr.isatty():
        return False
    try:
        return 0 not in os.get_terminal_size(sys.stderr.fileno())
    except OSError:
        return True


def tokens_reached(study_dir: str, agenda: Agenda) -> dict[int, int]:
    """Tokens that interrupted trials have seen, as far as evaluations tell; failed ones begin anew."""
    reached = {}
    for row in agenda.resumed:
        if row["status"] == "interrupted":
            seen = results.read_table(study_dir, "evals", trial=row["trial"])["num_tokens"].to_pylist()
            reached[row["trial"]] = max(seen, default=0)
    return reached
