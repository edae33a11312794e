"""The progress of a study: events and times in, counts, estimates and text out."""

from __future__ import annotations

import datetime
import heapq
import io
import itertools
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest

from raydisp import progress
from raydisp.config import StudyConfig
from raydisp.progress import Progress
from raydisp.search.agenda import Agenda
from raydisp.tally import Tally, duration

FULL, EVERY = 10_000, 1000
STARTUP_S, PER_TOKEN_S = 3.0, 0.004
NOON = datetime.datetime(2026, 1, 1, 12, tzinfo=datetime.UTC)


def row(trial: int, status: str = "completed", **columns: Any) -> dict[str, Any]:
    value = 5.0 + trial / 100 if status == "completed" else None
    found = {"trial": trial, "arm": "search", "status": status, "num_tokens": FULL, "val_loss": value}
    return {**found, **columns}


def timed_row(trial: int, status: str = "completed", tokens: int = FULL, resumed: int = 0) -> dict[str, Any]:
    took = STARTUP_S + (tokens - resumed) * PER_TOKEN_S
    return row(
        trial,
        status,
        num_tokens=tokens,
        started_at=NOON,
        ended_at=NOON + datetime.timedelta(seconds=took),
        startup_s=STARTUP_S,
        resumed_step=resumed // EVERY,
    )


def play(
    tally: Tally,
    trials: dict[int, int],
    *,
    places: int,
    begin: dict[int, int] | None = None,
    look: Callable[[float], None] = lambda now: None,
) -> float:
    """Run trials on places, as fast as they always are; returns when the last one has ended.

    Args:
        trials: number -> tokens that it uses.
        begin: number -> tokens that it goes on from.
        look: called after each event.
    """
    waiting = iter(trials.items())
    order = itertools.count()
    events: list[tuple[float, int, str, int, int]] = []

    def start_next(now: float) -> None:
        trial, used = next(waiting, (None, 0))
        if trial is None:
            return
        tally.started(trial, now)
        first = (begin or {}).get(trial, 0)
        for tokens in range(first, used + 1, EVERY):
            at = now + STARTUP_S + (tokens - first) * PER_TOKEN_S
            heapq.heappush(events, (at, next(order), "report", trial, tokens))
        heapq.heappush(events, (at, next(order), "end", trial, used))

    for _ in range(places):
        start_next(0.0)
    now = 0.0
    while events:
        now, _, kind, trial, tokens = heapq.heappop(events)
        if kind == "report":
            tally.reported(trial, tokens, now)
        else:
            tally.ended(row(trial, "completed" if tokens == FULL else "pruned", num_tokens=tokens), now)
            tally.stopped(trial, now)
            start_next(now)
        look(now)
    return now


def test_counts_follow_a_trial_through_its_life():
    tally = Tally(tokens_per_trial=FULL, to_come=range(5))
    assert tally.told_states() == "5 to come"
    tally.started(0, 0.0)
    tally.started(1, 0.0)
    assert tally.told_states() == "2 running, 3 to come"
    tally.ended(row(0, arm="baseline"), 1.0)
    tally.stopped(0, 1.0)
    tally.ended(row(1, "pruned", num_tokens=2000), 1.0)
    tally.started(2, 1.0)
    tally.stopped(2, 2.0)  # its process was lost, and it goes on later
    assert tally.told_states() == "1 done, 1 pruned, 3 to come"
    for trial, status in ((2, "failed"), (3, "diverged"), (4, "completed")):
        tally.started(trial, 3.0)
        tally.ended(row(trial, status), 4.0)
    assert tally.told_states() == "2 done, 1 pruned, 2 failed"
    assert (tally.num_ended, tally.num_trials, tally.frac()) == (5, 5, 1.0)
    assert tally.left_s(5.0) == 0.0


def test_the_best_is_of_completed_trials_that_are_no_baseline():
    rows = [
        row(0, arm="baseline", val_loss=1.0),
        row(1),
        row(2, val_loss=4.5),
        row(3, "failed", val_loss=1.0),
    ]
    tally = Tally(tokens_per_trial=FULL, finished=rows)
    assert tally.told_best() == "best val_loss 4.5000 (trial 2)"
    most = Tally(tokens_per_trial=FULL, finished=rows, better=max)
    assert most.told_best() == "best val_loss 5.0100 (trial 1)"
    assert Tally(tokens_per_trial=FULL, finished=rows, better=None).told_best() == ""


def test_speed_is_summed_over_running_trials_and_fades_when_they_are_silent():
    tally = Tally(tokens_per_trial=FULL, to_come=range(3))
    for trial in range(3):
        tally.started(trial, 0.0)
    assert tally.tokens_per_s(0.0) is None
    for trial, rate in ((0, 100), (1, 300)):
        for second in (10, 20, 30):
            tally.reported(trial, second * rate, float(second))
    assert tally.tokens_per_s(30.0) == pytest.approx(400)
    assert tally.told_speed(30.0) == "400 tokens/s"
    assert tally.tokens_per_s(110.0) == pytest.approx(100), "nothing came for four times as long"


def test_an_attempt_that_starts_over_does_not_count_twice():
    tally = Tally(tokens_per_trial=FULL, to_come=[0])
    tally.started(0, 0.0)
    for tokens in (0, 1000, 2000):
        tally.reported(0, tokens, 10.0 + tokens / 100)
    tally.reported(0, 0, 40.0)  # out of memory: once more
    tally.reported(0, 1000, 50.0)
    assert tally.tokens_per_s(50.0) == pytest.approx(100)
    assert tally.frac() == pytest.approx(0.1)


@pytest.mark.parametrize("places", [1, 2, 3, 16])
def test_time_left_is_right_from_the_second_report_on(places: int):
    """Every trial is as fast as every other: the estimate is then exact, the last wave included."""
    tally = Tally(tokens_per_trial=FULL, to_come=range(10), places=places)
    seen: list[tuple[float, float | None]] = []
    end = play(
        tally,
        dict.fromkeys(range(10), FULL),
        places=places,
        look=lambda now: seen.append((now, tally.left_s(now))),
    )
    assert seen[0][1] is None, "one report tells nothing"
    assert tally.told_left(0.0) == "about 0 s left"
    known = [(now, left) for now, left in seen if left is not None]
    assert len(known) > 90
    for now, left in known:
        # Between an end and the start of what follows a place is free for no time at all.
        assert now + left == pytest.approx(end, rel=1e-6)


def test_time_left_counts_trials_that_are_stopped_early():
    """One in four is not stopped: an estimate from full budgets would be twice as long."""
    used = {trial: FULL if trial % 4 == 0 else 2 * EVERY for trial in range(40)}
    tally = Tally(tokens_per_trial=FULL, to_come=list(used), places=2)
    seen: list[tuple[float, float | None]] = []
    end = play(tally, used, places=2, look=lambda now: seen.append((now, tally.left_s(now))))
    halfway = [(now, left) for now, left in seen if end * 0.4 < now < end * 0.7 and left is not None]
    assert len(halfway) > 20
    for now, left in halfway:
        assert left == pytest.approx(end - now, rel=0.2)
    full = STARTUP_S + FULL * PER_TOKEN_S
    assert end < 0.6 * 40 * full / 2


def test_time_left_after_a_restart_is_known_at_once_and_right():
    finished = [timed_row(0), timed_row(1, "pruned", 2 * EVERY), timed_row(2, resumed=5 * EVERY)]
    tally = Tally(
        tokens_per_trial=FULL,
        tokens_per_step=EVERY,
        finished=finished,
        to_come={3: 6 * EVERY, 4: 0, 5: 0},
        never_stopped=range(10),
        places=1,
    )
    assert tally.told_states() == "2 done, 1 pruned, 3 to come"
    truth = 3 * STARTUP_S + (4 * EVERY + 2 * FULL) * PER_TOKEN_S
    assert tally.left_s(0.0) == pytest.approx(truth)
    seen: list[float] = []
    end = play(
        tally,
        dict.fromkeys((3, 4, 5), FULL),
        places=1,
        begin={3: 6 * EVERY},
        look=lambda now: seen.append(now + (tally.left_s(now) or 0)),
    )
    assert end == pytest.approx(truth)
    assert seen == pytest.approx([truth] * len(seen))


def test_tokens_before_a_restart_are_no_speed():
    tally = Tally(tokens_per_trial=FULL, to_come={0: 8000})
    tally.started(0, 0.0)
    tally.reported(0, 8000, 10.0)
    assert tally.tokens_per_s(10.0) is None
    tally.reported(0, 9000, 20.0)
    assert tally.tokens_per_s(20.0) == pytest.approx(100)
    assert tally.left_s(20.0) == pytest.approx(10)


def test_a_budget_of_tokens_bounds_what_is_to_come():
    tally = Tally(
        tokens_per_trial=FULL, finished=[timed_row(0)], to_come=range(1, 100), max_tokens_total=3 * FULL + 5
    )
    assert tally.left_s(0.0) == pytest.approx(2 * (STARTUP_S + FULL * PER_TOKEN_S))


def test_many_trials_to_come_are_estimated_fast():
    tally = Tally(tokens_per_trial=FULL, finished=[timed_row(0)], to_come=range(1, 10_001), places=100)
    assert tally.left_s(0.0) == pytest.approx(100 * (STARTUP_S + FULL * PER_TOKEN_S))


def test_the_line_says_it_all():
    tally = Tally(tokens_per_trial=FULL, finished=[timed_row(0), timed_row(1, "failed")], to_come=range(2, 9))
    tally.started(2, 0.0)
    tally.reported(2, 0, 3.0)
    tally.reported(2, 1000, 7.0)
    assert tally.line(7.0) == (
        "about 4 min 54 s left; 250 tokens/s; best val_loss 5.0000 (trial 0); "
        "1 running, 1 done, 1 failed, 6 to come"
    )
    assert Tally(tokens_per_trial=FULL, to_come=range(2)).line(0.0) == "time left not known yet; 2 to come"


def test_the_best_of_large_numbers_is_whole():
    rows = [row(1, peak_memory_bytes=912345678)]
    tally = Tally(tokens_per_trial=FULL, metric="peak_memory_bytes", finished=rows)
    assert tally.told_best() == "best peak_memory_bytes 912,345,678 (trial 1)"


def test_durations():
    told = [duration(seconds) for seconds in (0.2, 59.4, 61, 3599, 3600, 90_000)]
    assert told == ["0 s", "59 s", "1 min 1 s", "59 min 59 s", "1 h 0 min", "25 h 0 min"]


# --- drawn -----------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def played(study: StudyConfig, clock: Clock, **options: Any) -> None:
    agenda = Agenda(finished=[], resumed=[], fixed=[0], new=[1, 2, 3])
    full = study.num_steps * study.train.global_batch_tokens
    with Progress(study, agenda, now=clock, **options) as shown:
        for trial in range(4):
            shown.started(trial)
            for tokens in (0, full // 2, full):
                clock.now += 1
                shown.reported({"trial": trial, "step": 1, "num_tokens": tokens})
                shown.tick()
            status = ("completed", "completed", "pruned", "failed")[trial]
            message = {"error_message": "it\nbroke"} if status == "failed" else {}
            arm = "search" if trial else "baseline"
            shown.finished(row(trial, status, arm=arm, num_tokens=full, test_loss=4.0, **message))
            shown.stopped(trial)
            clock.now += 200
            shown.tick()


def test_without_a_terminal_there_are_plain_lines(study: StudyConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    played(study, Clock(), quiet=False)
    lines = sys.stderr.getvalue().splitlines()  # type: ignore[attr-defined]
    assert "\r" not in "".join(lines)
    assert len(lines) == 4, "one for each; none of them comes five minutes after the one before"
    assert lines[0].startswith("[1/4] trial 0 (baseline) completed: val_loss 5.0000; about ")
    assert lines[1].endswith("; best val_loss 5.0100 (trial 1); 2 done, 2 to come")
    assert "[3/4] trial 2 (search) pruned: stopped after 1,280 of 1,280 tokens; " in lines[2]
    assert "[4/4] trial 3 (search) failed: it broke; about 0 s left; " in lines[3]


def test_without_a_terminal_long_trials_are_heard_of(study: StudyConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    clock = Clock()
    with Progress(study, Agenda([], [], [0], [1]), quiet=False, now=clock) as shown:
        shown.started(0)
        for _ in range(3000):
            clock.now += 0.5
            shown.tick()
    lines = sys.stderr.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines == ["[0/2] time left not known yet; 1 running, 1 to come"] * 5


def test_quiet_says_nothing(study: StudyConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    played(study, Clock(), quiet=True)
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


def test_a_terminal_has_a_bar(study: StudyConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(progress, "REDRAW_S", 0.0)
    played(study, Clock(), quiet=False)
    text = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "[2/4] trial 1 (search) completed: val_loss 5.0100\n" in text
    bars = [part for part in re.split(r"[\r\n]", text) if "%|" in part]
    assert bars[0].lstrip().startswith("0%|")
    assert "time left not known yet; 4 to come" in bars[0]
    assert any(" 50%|" in bar and "best val_loss 5.0100 (trial 1); 2 done, 2 to come" in bar for bar in bars)
    assert any("tokens/s; " in bar and "1 running" in bar for bar in bars)
    assert bars[-1].startswith("100%|")


def test_a_terminal_without_a_size_gets_plain_lines(study: StudyConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(Terminal, "fileno", lambda self: 2, raising=False)
    monkeypatch.setattr(progress.os, "get_terminal_size", lambda number: (0, 0))
    played(study, Clock(), quiet=False)
    assert "%|" not in sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert sys.stderr.getvalue().count("\n") == 4  # type: ignore[attr-defined]


def test_the_confirm_phase_tells_test_losses_and_no_best(study: StudyConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    played(study, Clock(), quiet=False, metric="test_loss")
    text = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "trial 1 (search) completed: test_loss 4.0000; " in text
    assert "best" not in text
