"""The dispersion weight over a training: constant, warmed up, decaying, or on from a given point.

Nothing but arithmetic: a function of the step, so that a training that resumes, and every worker of one,
finds the same weight, and no state is kept.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

ScheduleName = Literal["constant", "linear_warmup", "cosine_decay", "delayed"]

WARMUP_FRAC = 0.2
"""Of all steps: the warm-up of `linear_warmup`, where nothing is said; the learning rate's is as long."""

START_FRAC = 0.5
"""Of all steps: what `delayed` waits for, where nothing is said."""

FRACTIONS: dict[str, ScheduleName] = {"warmup_frac": "linear_warmup", "start_frac": "delayed"}
"""Setting -> the one schedule that has it."""


def check_fractions(
    name: ScheduleName, *, warmup_frac: float | None, start_frac: float | None, where: str = ""
) -> None:
    """Raise ValueError for a fraction of another schedule; `where` is put before the names of settings."""
    for setting, value in (("warmup_frac", warmup_frac), ("start_frac", start_frac)):
        wanted = FRACTIONS[setting]
        if value is not None and name != wanted:
            raise ValueError(
                f"{where}{setting} = {value:g} is of {where}schedule = {wanted}, and the schedule is {name}; "
                f"leave it out (null), or use schedule: {wanted}"
            )


@dataclasses.dataclass(frozen=True)
class WeightSchedule:
    """What share of its weight the dispersion term has in each step of a training of T steps, counted from 0.

    | name | share in step s |
    |---|---|
    | constant | 1 |
    | linear_warmup | min(1, (s + 1) / W), W = ceil(warmup_frac T): the last step of the warm-up has it all |
    | cosine_decay | (1 + cos(pi s / T)) / 2: all of it in the first step, 0 only after the last |
    | delayed | 0 until start_frac T steps are done, then 1; the last step always has it |

    All steps have the same tokens, so that fractions of steps are fractions of tokens. The first two are the
    warm-up and the decay of the learning rate (`raydisp.optimizer.learning_rate_factor`).

    Raises:
        ValueError: no such name, no step, or a fraction out of range or of another schedule.
    """

    num_steps: int
    name: ScheduleName = "constant"
    warmup_frac: float | None = None
    """In [0, 1], of linear_warmup; None: WARMUP_FRAC."""
    start_frac: float | None = None
    """In [0, 1), of delayed; None: START_FRAC."""

    def __post_init__(self) -> None:
        names = ScheduleName.__args__  # type: ignore[attr-defined]
        if self.name not in names:
            raise ValueError(f'schedule = "{self.name}" is not one of {", ".join(names)}.')
        if self.num_steps < 1:
            raise ValueError(f"num_steps = {self.num_steps} is not at least 1.")
        check_fractions(self.name, warmup_frac=self.warmup_frac, start_frac=self.start_frac)
        if self.warmup_frac is not None and not 0.0 <= self.warmup_frac <= 1.0:
            raise ValueError(f"warmup_frac = {self.warmup_frac} is not in [0, 1].")
        if self.start_frac is not None and not 0.0 <= self.start_frac < 1.0:
            raise ValueError(f"start_frac = {self.start_frac} is not in [0, 1).")

    @property
    def whole_steps(self) -> int:
        """The first steps, which a warm-up takes or a delayed term waits for; 0 of another schedule."""
        if self.name == "linear_warmup":
            frac = WARMUP_FRAC if self.warmup_frac is None else self.warmup_frac
            return min(_ceil(frac * self.num_steps), self.num_steps)
        if self.name == "delayed":
            frac = START_FRAC if self.start_frac is None else self.start_frac
            return min(_ceil(frac * self.num_steps), self.num_steps - 1)
        return 0

    def describe(self) -> str:
        """For people: `its weight rises over the first 40 of 200 steps`."""
        first = f"the first {self.whole_steps:,} of {self.num_steps:,} steps"
        return {
            "constant": "its weight is the same in all steps",
            "linear_warmup": f"its weight rises over {first}",
            "cosine_decay": f"its weight falls to 0 over the {self.num_steps:,} steps, as a cosine",
            "delayed": f"it is off in {first}",
        }[self.name]

    def __call__(self, step: int) -> float:
        """The share in a step, in [0, 1]; steps from num_steps on have that of the last."""
        step = min(step, self.num_steps - 1)
        if self.name == "linear_warmup":
            return min(1.0, (step + 1) / max(1, self.whole_steps))
        if self.name == "cosine_decay":
            return 0.5 * (1 + math.cos(math.pi * step / self.num_steps))
        return float(step >= self.whole_steps)


def _ceil(number: float) -> int:
    # 0.7 of 10 steps are 7, and not the 8 that floats make of 7.000000000000001.
    return math.ceil(round(number, 9))
