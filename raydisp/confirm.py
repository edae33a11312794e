"""The confirm phase: the search's best configurations and every other arm again, on fresh paired seeds.

A search keeps the luckiest of many trials on one seed, so its scores say nothing about an effect. What is
to be tested is settled before any of these runs and written to `confirm.yaml`: arms, seeds, outcome, test and
the smallest effect that matters. From then on neither the search nor the plan changes.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import yaml
from pydantic import ValidationError

from raydisp import paired, results, space, storage
from raydisp.agenda import Agenda, Row, make_agenda, read_agenda
from raydisp.analysis import describe_trial, value_of
from raydisp.arms import SEARCH, Arm, Arms
from raydisp.config import ScratchModel, StudyConfig
from raydisp.confirm_config import BASELINE
from raydisp.errors import OutputError, RaydispError, VerdictError
from raydisp.section import MAX_SEED, Section
from raydisp.stopping import full_tokens
from raydisp.studyfile import explain

if TYPE_CHECKING:
    from raydisp.dispatch import Launch
    from raydisp.worker import Assignment

ALPHA = 0.05
FILE = "confirm.yaml"
IMPLICIT_ARM = "dispersion"
"""What the best configurations of a study without arms are called."""

TEST = (
    "paired Student t over seeds, two-sided, Holm over the arms at alpha; beside it the exact sign-flip "
    "test; no effect that matters where the 90 % interval lies within +-smallest_effect (two one-sided tests)"
)


class NothingToConfirmError(RaydispError):
    """The search has not found what the confirm phase would run."""


class FrozenArm(Section):
    """One configuration that is run on every seed."""

    arm: str
    """That it had in the search."""
    from_trial: int | None
    """None: it was not searched."""
    values: dict[str, Any]
    """Fields that differ from the study file."""
    description: str


class Frozen(Section):
    """What `confirm.yaml` says."""

    schema_version: Literal[1] = 1
    study: str
    frozen_at: str
    primary_outcome: Literal["test_loss"] = "test_loss"
    unit: Literal["nats per token"] = "nats per token"
    hypotheses: list[str]
    test: str = TEST
    alpha: float = ALPHA
    smallest_effect: float
    seeds: list[int]
    baseline: Literal["baseline"] = "baseline"
    arms: dict[str, FrozenArm]
    pretrained: bool
    """The model's weights are not drawn: the seed varies order and noise only."""
    spread: float | None
    """Standard deviation over seeds of the paired difference, as known before; null: it was not."""
    promise: dict[str, float] | None
    """What the runs can be expected to show, given the spread."""
    num_search_trials: int
    """`search.num_trials`, when the search was over."""
    first_trial: int
    keep_models: Literal["first_seed", "all", "none"]
    data_sha256: str | None
    """Of the data of the search."""

    @property
    def num_trials(self) -> int:
        """Runs of the phase."""
        return len(self.arms) * len(self.seeds)

    def trials(self) -> dict[int, tuple[str, int]]:
        """Number -> arm and seed: the arms of a seed stand side by side."""
        pairs = [(arm, seed) for seed in self.seeds for arm in self.arms]
        return {self.first_trial + index: pair for index, pair in enumerate(pairs)}

    def headline(self) -> str:
        """One line: what is about to run, and why."""
        arms = ", ".join(
            name + (f" (trial {one.from_trial})" if one.from_trial is not None else "")
            for name, one in self.arms.items()
        )
        return (
            f"Confirming {arms} on {len(self.seeds)} fresh seeds each, {self.num_trials} runs, as settled in "
            f"{FILE}."
        )

    def keeps_model(self, seed: int) -> bool:
        """Whether the weights of the runs on a seed are kept."""
        return self.keep_models == "all" or (self.keep_models == "first_seed" and seed == self.seeds[0])

    def to_json(self) -> str:
        """As it stands on every row."""
        return json.dumps(self.model_dump(mode="json"))  # in the order of the arms


# --- before the runs -------------------------------------------------------------------------------------


def num_arms(study: StudyConfig) -> int:
    """Arms beside the baseline that the confirm phase has at the most."""
    assert study.confirm is not None
    return sum(
        study.confirm.top_k if arm.searched and arm.may_disperse else 1
        for arm in Arms(study).all
        if not arm.is_baseline
    )


def num_seeds(study: StudyConfig, arms: int) -> int:
    """Seeds of each arm: as the file has it, or as many as the sign-flip test needs to speak."""
    assert study.confirm is not None
    return study.confirm.num_seeds or paired.num_seeds_needed(arms)


def known_spread(study: StudyConfig) -> float | None:
    """The spread that the file gives, or that it says where to find; None: it says nothing.

    Raises:
        OutputError: there is none where it points to.
    """
    from raydisp import verdict

    assert study.confirm is not None
    origin = study.confirm.spread_from
    if origin is None:
        return study.confirm.spread
    try:
        found = verdict.largest_spread(results.read_table(origin, "trials"))
    except VerdictError:
        found = None
    if found is None:
        raise OutputError(
            f"confirm.spread_from names {origin}, which has no confirm phase with two seeds or more of an "
            "arm and its baseline; name another results folder, or give confirm.spread"
        )
    return found


def freeze(study: StudyConfig, trials: pa.Table) -> Frozen:
    """What the confirm phase runs and decides, by the rows of the search.

    Raises:
        NothingToConfirmError: an arm has no configuration to confirm, or the study is broken.
    """
    settings = study.confirm
    assert settings is not None
    rows = trials.filter(pc.equal(trials["phase"], "search")).to_pylist()
    _refuse_broken(study, rows)
    arms = Arms(study)
    chosen: dict[str, FrozenArm] = {}
    for arm in sorted(arms.all, key=lambda arm: not arm.is_baseline):
        chosen |= _choose(study, arm, rows)
    used = {row["seed"] for row in rows} | {study.seed}
    m = len(chosen) - 1
    seeds = _fresh_seeds(study.seed, used, num_seeds(study, m))
    spread = known_spread(study)
    return Frozen(
        study=study.name,
        frozen_at=results.now().isoformat(timespec="seconds"),
        hypotheses=[
            f"the mean over seeds of test_loss({name}) - test_loss({BASELINE}) is 0"
            for name in chosen
            if name != BASELINE
        ],
        smallest_effect=settings.smallest_effect,
        seeds=seeds,
        arms=chosen,
        pretrained=not isinstance(study.model, ScratchModel),
        spread=spread,
        promise=None
        if spread is None
        else dataclasses.asdict(paired.promise(spread, len(seeds), m, settings.smallest_effect)),
        num_search_trials=study.search.num_trials,
        first_trial=arms.num_trials,
        keep_models=settings.keep_models,
        data_sha256=next((row["data_sha256"] for row in rows if row["data_sha256"] is not None), None),
    )


def _refuse_broken(study: StudyConfig, rows: Sequence[Row]) -> None:
    failed = [row for row in rows if row["status"] == "failed"]
    limit = study.failures.max_failed_trials
    if limit is not None and len(failed) > limit:
        raise NothingToConfirmError(
            f"{len(failed)} trials of the search failed, more than failures.max_failed_trials = {limit}; "
            "mend what is broken and run the command with --retry-failed"
        )


def _choose(study: StudyConfig, arm: Arm, rows: Sequence[Row]) -> dict[str, FrozenArm]:
    """Confirm arm -> configuration: the best of a searched arm, or what an arm that is not searched says."""
    name = IMPLICIT_ARM if arm.name == SEARCH and study.arms is None else arm.name
    if not arm.searched:
        told = ", ".join(f"{field} {value}" for field, value in arm.fixed.items())
        return {name: FrozenArm(arm=arm.name, from_trial=None, values=arm.fixed, description=told)}
    ours = [row for row in rows if row["arm"] == arm.name]
    objective, full = study.search.primary, full_tokens(study)
    scored: dict[str, tuple[float, Row]] = {}
    for row in sorted(ours, key=lambda row: row["trial"]):
        value = value_of(row, objective.metric)
        config = json.loads(row["config_json"])
        if value is None or row["num_tokens"] != full:
            continue
        if arm.may_disperse and config["dispersion"]["weight"] == 0:
            continue
        scored.setdefault(row["config_sha256"], (value if objective.mode == "min" else -value, row))
    best = sorted(scored.values(), key=lambda pair: (pair[0], pair[1]["trial"]))
    assert study.confirm is not None
    best = best[: study.confirm.top_k if arm.may_disperse else 1]
    if not best:
        counts = collections.Counter(row["status"] for row in ours)
        told = ", ".join(f"{number} {status}" for status, number in counts.items()) or "none has ended"
        raise NothingToConfirmError(
            f"no trial of {'the search' if arm.name == SEARCH else f'arm {arm.name}'} completed its {full:,} "
            f"tokens with a {objective.metric}{' and a weight other than 0' if arm.may_disperse else ''} "
            f"({told}); see the trials' errors, then raise search.num_trials or use --retry-failed"
        )
    chosen = {}
    for index, (_, row) in enumerate(best, start=1):
        searched = space.searched_values(arm.study, json.loads(row["config_json"]))
        chosen[name if len(best) == 1 else f"{name}_{index}"] = FrozenArm(
            arm=arm.name,
            from_trial=row["trial"],
            values={**arm.fixed, **searched},
            description=describe_trial(row, list(searched)),
        )
    return chosen


def _fresh_seeds(seed: int, used: set[int], number: int) -> list[int]:
    fresh: list[int] = []
    candidate = seed
    while len(fresh) < number:
        candidate = (candidate + 1) % (MAX_SEED + 1)
        if candidate not in used:
            fresh.append(candidate)
    return fresh


def describe(study: StudyConfig) -> list[str]:
    """The plan of the phase in lines, for people, before anything runs."""
    settings = study.confirm
    if settings is None:
        return []
    m = num_arms(study)
    n = num_seeds(study, m)
    tokens = (m + 1) * n * full_tokens(study)
    lines = [
        f"{n} fresh seeds x {m + 1} arms = {n * (m + 1)} trials, {tokens:,} training tokens; outcome "
        "test_loss, on test text that nothing else sees",
        f"paired t-test, Holm over {m} arm{'s' if m > 1 else ''} at {ALPHA:g}; smallest effect that matters "
        f"{settings.smallest_effect:g} nats per token",
    ]
    spread = known_spread(study)
    if spread is None:
        lines.append("power: not known without a spread; give confirm.spread, or confirm.spread_from")
    else:
        promise = paired.promise(spread, n, m, settings.smallest_effect)
        lines.append(
            f"with a spread of {spread:.3g} nats over seeds: an effect of {promise.effect_shown:.3g} is "
            f"shown with {paired.PROMISED_POWER:.0%} chance, one of {settings.smallest_effect:g} with "
            f"{promise.power:.0%}; where there is none, that is found with {promise.no_effect_chance:.0%}"
        )
    return lines


def warnings(study: StudyConfig) -> list[str]:
    """What is allowed and limits what can be said."""
    if study.confirm is None:
        return []
    m = num_arms(study)
    n, needed = num_seeds(study, m), paired.num_seeds_needed(m)
    found = []
    if n < needed:
        found.append(
            f"with confirm.num_seeds = {n} the exact sign-flip test cannot reach {ALPHA:g} after Holm for "
            f"{m} arm{'s' if m > 1 else ''}: its smallest p-value is {min(1.0, 2 * m / 2**n):.3g}; {needed} "
            "seeds could"
        )
    if study.arms is None:
        shared = [name for name in study.search.space if not name.startswith("dispersion.")]
        if shared:
            found.append(
                f"{' and '.join(shared)} is tuned for dispersion and not for the baseline, which is unfair "
                "to the baseline; name the arms (arms:), and each is tuned alike"
            )
    return found


# --- the frozen plan ---------------------------------------------------------------------------------------


def write_frozen(study_dir: str, frozen: Frozen) -> None:
    """Write `confirm.yaml`, before any of its runs."""
    text = yaml.safe_dump(frozen.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    head = (
        "# Settled when the search was over, before any confirm run. It does not change: a new plan is a\n"
        "# new study (--fork NAME).\n"
    )
    storage.write_bytes(storage.join(study_dir, FILE), (head + text).encode())


def read_frozen(study_dir: str) -> Frozen | None:
    """The frozen plan of a study; None: there is none yet.

    Raises:
        OutputError: the file is not one that raydisp wrote.
    """
    place = storage.join(study_dir, FILE)
    try:
        tree = yaml.safe_load(storage.read_bytes(place).decode())
    except FileNotFoundError:
        return None
    except (UnicodeDecodeError, yaml.YAMLError) as problem:
        raise OutputError(f"{place} cannot be read ({problem}); restore it") from None
    try:
        return Frozen.model_validate(tree)
    except ValidationError as error:
        raise OutputError(f"{place}: {explain(error, tree)}; it is not to be changed: restore it") from None


def refuse_changes(study: StudyConfig, frozen: Frozen, study_dir: str) -> None:
    """A plan that has been settled is not changed by what came out, or by a longer search.

    Raises:
        OutputError: the study file asks for another one.
    """
    place = storage.join(study_dir, FILE)
    rest = "restore the file, or start a new study that knows the old trials, with --fork NAME"
    settings = study.confirm
    if settings is None:
        raise OutputError(f"{place} was settled, and the study file has no confirm section any more; {rest}")
    changed: list[tuple[str, float, float]] = []
    if study.search.num_trials != frozen.num_search_trials:
        changed.append(("search.num_trials", frozen.num_search_trials, study.search.num_trials))
    if settings.smallest_effect != frozen.smallest_effect:
        changed.append(("confirm.smallest_effect", frozen.smallest_effect, settings.smallest_effect))
    if settings.num_seeds is not None and settings.num_seeds != len(frozen.seeds):
        changed.append(("confirm.num_seeds", len(frozen.seeds), settings.num_seeds))
    if num_arms(study) < len(frozen.arms) - 1:
        changed.append(("confirm.top_k", len(frozen.arms) - 1, num_arms(study)))
    if changed:
        told = "; ".join(f"{name} ({was} -> {now})" for name, was, now in changed)
        raise OutputError(f"{place} was settled before its runs, and this differs from it: {told}; {rest}")


@dataclasses.dataclass(frozen=True)
class Work:
    """What is left of a study: of its search, and of its confirm phase once that is settled."""

    search: Agenda
    frozen: Frozen | None = None
    confirm: Agenda | None = None
    """None: not settled yet."""

    def num_trials(self, study: StudyConfig) -> int:
        """Trials to run now, those of a confirm phase that is yet to be settled included."""
        if study.confirm is None:
            return self.search.num_trials
        if self.confirm is not None:
            return self.confirm.num_trials
        m = num_arms(study)
        return self.search.num_trials + (m + 1) * num_seeds(study, m)


def read_work(study: StudyConfig, study_dir: str, *, retry_failed: bool = False) -> Work:
    """What the rows and the frozen plan say has been done, and what the study file still asks for.

    Args:
        retry_failed: trials that failed are open again.
    Raises:
        OutputError: rows are there that cannot be read, or the file asks for another plan than the frozen.
    """
    search = read_agenda(study, study_dir, retry_failed=retry_failed)
    frozen = read_frozen(study_dir)
    if frozen is None:
        return Work(search)
    refuse_changes(study, frozen, study_dir)
    over = dataclasses.replace(search, resumed=[], fixed=[], new=[])
    return Work(over, frozen, read_confirm_agenda(frozen, study_dir, retry_failed=retry_failed))


def settle(study: StudyConfig, study_dir: str) -> Work:
    """Freeze the plan, now that the search is over. Raises as `freeze`."""
    frozen = freeze(study, results.latest_attempts(results.read_table(study_dir, "trials", strict=True)))
    write_frozen(study_dir, frozen)
    return read_work(study, study_dir)


def read_confirm_agenda(frozen: Frozen, study_dir: str, *, retry_failed: bool = False) -> Agenda:
    """What is left to do of the phase. Raises as `raydisp.agenda.read_agenda`."""
    attempts = results.read_table(study_dir, "trials", strict=True)
    return make_agenda(
        attempts.filter(pc.equal(attempts["phase"], "confirm")),
        fixed=list(frozen.trials()),
        wanted=[],
        retry_failed=retry_failed,
    )


# --- its runs ----------------------------------------------------------------------------------------------


class ConfirmDispatcher:
    """Hands out the runs of the phase: those that were interrupted, then seed by seed."""

    def __init__(
        self,
        launch: Launch,
        frozen: Frozen,
        agenda: Agenda,
        *,
        on_finished: Callable[[Row], None] = lambda row: None,
    ) -> None:
        """Args: on_finished: called with the row of each run that ends for good."""
        self._launch = launch
        self._frozen = frozen
        self._pairs = frozen.trials()
        self._text = frozen.to_json()
        self._on_finished = on_finished
        self.running: dict[int, Assignment] = {}
        self.over: str | None = None
        """Why no further run starts, where that is not their number."""
        self._waiting = collections.deque(
            [self._assign(row["trial"], row["attempt"] + 1) for row in agenda.resumed]
            + [self._assign(trial, 1) for trial in agenda.fixed]
        )
        self._failed = [row for row in agenda.finished if row["status"] == "failed"]

    def _assign(self, trial: int, attempt: int) -> Assignment:
        arm, seed = self._pairs[trial]
        return self._launch.assign(
            trial,
            attempt,
            arm,
            {**self._frozen.arms[arm].values, "seed": seed},
            stops=False,
            confirm_json=self._text,
            keep_model=self._frozen.keeps_model(seed),
        )

    def next(self) -> Assignment | None:
        """The next assignment; None: none now, and none at all once nothing is running."""
        if not self._waiting:
            return None
        limit = self._launch.study.failures.max_failed_trials
        if limit is not None and len(self._failed) > limit:
            message = " ".join((self._failed[0]["error_message"] or "").split())[:300]
            self.over = (
                f"{len(self._failed)} confirm runs failed, more than failures.max_failed_trials = {limit}; "
                f"the first was trial {self._failed[0]['trial']}: {message}. Mend that and run the command "
                "with --retry-failed"
            )
            return None
        assignment = self._waiting.popleft()
        self.running[assignment.trial] = assignment
        return assignment

    def reported(self, trial: int, metrics: Mapping[str, Any]) -> None:
        """Nobody decides by what a run shows on the way."""

    def put_back(self, assignment: Assignment, attempt: int) -> None:
        """A run goes on with another attempt."""
        self.running.pop(assignment.trial, None)
        self._waiting.appendleft(dataclasses.replace(assignment, attempt=attempt))

    def leave(self, trial: int) -> None:
        """A run goes on with the next run of the command."""
        self.running.pop(trial, None)

    def close(self, row: Row, curve: Sequence[Any] = ()) -> None:
        """A run has ended for good."""
        self.running.pop(row["trial"], None)
        if row["status"] == "failed":
            self._failed.append(row)
        self._on_finished(row)
