"""How a study that runs is doing: trials by state, best so far, speed, time left.

Events and the times at which they came go in, text comes out; what draws it is `progress`.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from raydisp.config.confirm import BASELINE

Row = Mapping[str, Any]

STATES = {
    "completed": "done",
    "pruned": "pruned",
    "failed": "failed",
    "diverged": "failed",
}
"""Status of a trial that has ended -> what is counted."""

MAX_SCHEDULED = 2000
"""Trials to come whose places are worked out one by one; of more, what one place has to do is enough."""


class Watcher(Protocol):
    """Is told what happens in a phase of a study; what derives from it may leave out what it ignores."""

    def started(self, trial: int) -> None:
        """A trial has its place and begins, or goes on."""

    def reported(self, result: Mapping[str, Any]) -> None:
        """A running trial has evaluated: trial, step, num_tokens, elapsed_s and the metrics."""

    def stopped(self, trial: int) -> None:
        """A trial has left its place, whether it has ended or goes on elsewhere or later."""

    def finished(self, row: Row) -> None:
        """A trial has ended for good."""

    def tick(self) -> None:
        """Time has passed; called often."""


@dataclasses.dataclass
class _Run:
    """A trial that has a place."""

    started_at: float
    reports: collections.deque[tuple[float, int]] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=4)
    )
    """Its last ones: time and tokens."""
    first: tuple[float, int] | None = None
    """The first one: what lies before it is start-up, or was done by an earlier run of the command."""


class Tally:
    """Counts and estimates of one phase of a study, over all runs of the command.

    A trial takes a start-up, and seconds for each token; both are means over trials that have ended, in this
    run or before, and over those that run. How many tokens one will use is the mean of what trials that came
    as far have used, so that trials which are stopped early count. Places are then filled as they fall free.
    """

    def __init__(
        self,
        *,
        tokens_per_trial: int,
        tokens_per_step: int = 0,
        finished: Sequence[Row] = (),
        to_come: Mapping[int, int] | Collection[int] = (),
        places: int = 1,
        metric: str = "val_loss",
        better: Callable[[float, float], float] | None = min,
        never_stopped: Collection[int] = (),
        max_tokens_total: int | None = None,
    ) -> None:
        """Args:
        tokens_per_trial: of one that is not stopped.
        tokens_per_step: to know from a row where its attempt went on from.
        finished: rows of trials that have ended before.
        to_come: numbers of those that have not, with the tokens that they have seen already.
        places: trials that run at a time.
        metric: column of `trials` that each is told by.
        better: of two values; None: there is no best.
        never_stopped: numbers of trials that use all their tokens, if nothing breaks.
        max_tokens_total: no trial starts that would exceed it.
        """
        self._full = tokens_per_trial
        self._step = tokens_per_step
        self._places = places
        self.metric = metric
        self._better = better
        self._never_stopped = set(never_stopped)
        self._max_total = max_tokens_total
        self._to_come = dict(to_come) if isinstance(to_come, Mapping) else dict.fromkeys(to_come, 0)
        self._running: dict[int, _Run] = {}
        self._ended: dict[int, str] = {}
        self._used: list[int] = []
        """Tokens of trials that may be stopped and have ended."""
        self._all_used = 0
        self._startups: list[float] = []
        self._trained_s, self._trained_tokens = 0.0, 0
        self.best: tuple[float, int] | None = None
        for row in finished:
            self._take(row)
            self._learn_from_row(row)

    # --- events ------------------------------------------------------------------------------------------

    def started(self, trial: int, now: float) -> None:
        """A trial begins, or goes on."""
        self._running[trial] = _Run(now)

    def reported(self, trial: int, num_tokens: int, now: float) -> None:
        """A trial has come to so many tokens."""
        run = self._running.get(trial)
        if run is None:
            return
        if run.reports and num_tokens <= run.reports[-1][1]:
            if num_tokens == run.reports[-1][1]:
                return
            run.reports.clear()  # another attempt, from an earlier step
            run.first = None
        if run.first is None:
            run.first = (now, num_tokens)
        run.reports.append((now, num_tokens))
        if trial in self._to_come:
            self._to_come[trial] = num_tokens

    def stopped(self, trial: int, now: float) -> None:
        """A trial has left its place; unless it has ended, it is to come again."""
        self._learn_from_run(self._running.pop(trial, None), None)

    def ended(self, row: Row, now: float) -> None:
        """A trial has ended for good."""
        run = self._running.pop(row["trial"], None)
        self._take(row)
        self._learn_from_run(run, now if row["status"] in ("completed", "pruned") else None)

    def _take(self, row: Row) -> None:
        trial, tokens = row["trial"], row.get("num_tokens")
        self._to_come.pop(trial, None)
        self._ended[trial] = STATES.get(row["status"], "failed")
        if tokens is not None:
            self._all_used += tokens
            if trial not in self._never_stopped:
                self._used.append(tokens)
        value = row.get(self.metric)
        if row["status"] != "completed" or row.get("arm") == BASELINE or value is None:
            return
        if self._better is not None and (
            self.best is None or self._better(value, self.best[0]) != self.best[0]
        ):
            self.best = (value, trial)

    def _learn_from_row(self, row: Row) -> None:
        """What an earlier run of the command tells about how long trials take."""
        begun, ended, tokens = row.get("started_at"), row.get("ended_at"), row.get("num_tokens")
        if row["status"] not in ("completed", "pruned") or begun is None or ended is None or tokens is None:
            return
        startup = row.get("startup_s") or 0.0
        done = tokens - (row.get("resumed_step") or 0) * self._step
        if done > 0:
            self._startups.append(startup)
            self._trained_s += max(0.0, (ended - begun).total_seconds() - startup)
            self._trained_tokens += done

    def _learn_from_run(self, run: _Run | None, ended_at: float | None) -> None:
        if run is None or run.first is None:
            return
        self._startups.append(run.first[0] - run.started_at)
        last_at, last_tokens = run.reports[-1]
        self._trained_s += (last_at if ended_at is None else ended_at) - run.first[0]
        self._trained_tokens += last_tokens - run.first[1]

    # --- what is known -----------------------------------------------------------------------------------

    @property
    def num_trials(self) -> int:
        """Of the whole phase."""
        return len(self._ended) + len(self._to_come)

    @property
    def num_ended(self) -> int:
        return len(self._ended)

    def counts(self) -> dict[str, int]:
        """Trials by state; those of no trial are left out."""
        ended = collections.Counter(self._ended.values())
        states = {
            "running": len(self._running),
            "done": ended["done"],
            "pruned": ended["pruned"],
            "failed": ended["failed"],
            "to come": sum(trial not in self._running for trial in self._to_come),
        }
        return {state: number for state, number in states.items() if number}

    def tokens_per_s(self, now: float) -> float | None:
        """Over all running trials, by their last reports; None: none of them has reported twice."""
        rates = []
        for run in self._running.values():
            if len(run.reports) > 1:
                (since, before), (last, tokens) = run.reports[0], run.reports[-1]
                # One that is silent for longer than it took to come so far is slower than it was.
                rates.append((tokens - before) / max(last - since, now - last, 1e-9))
        return sum(rates) if rates else None

    def frac(self) -> float:
        """Of the work of the phase that is done, in [0, 1]."""
        done = sum(
            min(1.0, self._to_come.get(trial, 0) / self._expected(trial)) for trial in self._running
        ) + len(self._ended)
        return done / self.num_trials if self.num_trials else 1.0

    def left_s(self, now: float) -> float | None:
        """Seconds until the last trial has ended; None: nothing is known yet."""
        pace = self._pace()
        if pace is None:
            return 0.0 if not self._to_come else None
        startup, per_token = pace
        busy = [self._left_of(trial, run, now, pace) for trial, run in self._running.items()]
        waiting = [trial for trial in self._to_come if trial not in self._running]
        if self._max_total is not None:
            room = self._max_total - self._all_used - len(self._running) * self._full
            waiting = waiting[: max(0, room // self._full)]
        each = [
            startup + per_token * max(0.0, self._expected(trial) - self._to_come[trial]) for trial in waiting
        ]
        return _makespan(busy, each, self._places)

    def _pace(self) -> tuple[float, float] | None:
        """Seconds of start-up, and for each token."""
        startups, seconds, tokens = list(self._startups), self._trained_s, self._trained_tokens
        for run in self._running.values():
            if run.first is not None:
                startups.append(run.first[0] - run.started_at)
                seconds += run.reports[-1][0] - run.first[0]
                tokens += run.reports[-1][1] - run.first[1]
        return (sum(startups) / len(startups), seconds / tokens) if tokens and startups else None

    def _left_of(self, trial: int, run: _Run, now: float, pace: tuple[float, float]) -> float:
        startup, per_token = pace
        tokens = self._to_come.get(trial, 0)
        training = per_token * max(0.0, self._expected(trial) - tokens)
        if run.first is None:
            return max(0.0, startup - (now - run.started_at)) + training
        return max(0.0, training - (now - run.reports[-1][0]))

    def _expected(self, trial: int) -> float:
        """Tokens that a trial will have used at its end."""
        if trial in self._never_stopped:
            return self._full
        as_far = [used for used in self._used if used > self._to_come.get(trial, 0)]
        return sum(as_far) / len(as_far) if as_far else self._full

    # --- as text -----------------------------------------------------------------------------------------

    def told_states(self) -> str:
        """For example `2 running, 3 done, 1 pruned, 3 to come`."""
        return ", ".join(f"{number:,} {state}" for state, number in self.counts().items())

    def told_best(self) -> str:
        """For example `best val_loss 5.1234 (trial 4)`; nothing where there is none yet."""
        if self.best is None:
            return ""
        return f"best {self.metric} {told_value(self.best[0])} (trial {self.best[1]})"

    def told_speed(self, now: float) -> str:
        """For example `12,300 tokens/s`; nothing where it is not known."""
        rate = self.tokens_per_s(now)
        return "" if rate is None else f"{float(f'{rate:.3g}'):,.0f} tokens/s"

    def told_left(self, now: float) -> str:
        """For example `about 4 min 10 s left`."""
        left = self.left_s(now)
        return "time left not known yet" if left is None else f"about {duration(left)} left"

    def line(self, now: float) -> str:
        """All of it, what matters most first, for a line that a narrow terminal cuts off."""
        parts = [self.told_left(now), self.told_speed(now), self.told_best(), self.told_states()]
        return "; ".join(part for part in parts if part)


def _makespan(busy: Sequence[float], each: Sequence[float], places: int) -> float:
    """When all is done, if what waits takes the place that falls free next.

    Args:
        busy: seconds until a place falls free, for those that are taken.
        each: seconds of what waits, in order.
    """
    free_at = list(busy) + [0.0] * (places - len(busy))
    if len(each) > MAX_SCHEDULED:
        return max([(sum(free_at) + sum(each)) / len(free_at), *free_at])
    heapq.heapify(free_at)
    for seconds in each:
        heapq.heappush(free_at, heapq.heappop(free_at) + seconds)
    return max(free_at, default=0.0)


def told_value(value: float) -> str:
    """For example `5.1234`; `912,345,678` of what is counted in large numbers."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4f}"


def duration(seconds: float) -> str:
    """For example `2 h 5 min`, `3 min 20 s`, `12 s`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
