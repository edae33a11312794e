"""Tasks of lm-evaluation-harness, loaded and checked: found by name, data read, metric known, nothing unsafe.

Loading needs no model, so that the command can do it before the first trial; each worker does it again. The
harness is the extra `eval`, imported where tasks are used and nowhere else.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raydisp import hub
from raydisp.config import EvaluateConfig, StudyConfig, TrialConfig
from raydisp.config.tasks import Task, check_installed
from raydisp.errors import ConfigError, suggest

PREFERRED_METRICS = ("acc_norm", "acc", "exact_match", "word_perplexity", "perplexity", "bits_per_byte")
"""Which metric is a task's value where the study file does not say: the first of these that it has, else its
own first. `acc_norm` divides the log-likelihood of an answer by its length: models prefer short ones."""

SHOTS_SEED = 1234
PYTHON_SEED = 0
OTHER_SEED = 1234
"""As the harness's own command draws examples and seeds generators by default."""


@dataclass(frozen=True)
class Benchmark:
    """What is evaluated, and has one value: a task, or a group of tasks that says how to average them."""

    name: str
    entry: Task
    """Of the study file."""
    loaded: dict[str, Any]
    """`tasks` and `groups` as the harness's TaskManager returns them."""
    metric: str
    """Without the harness's filter."""
    higher_is_better: bool | None
    """None: the harness does not say."""

    @property
    def tasks(self) -> dict[str, Any]:
        """Name -> task of the harness."""
        found: dict[str, Any] = self.loaded["tasks"]
        return found

    @property
    def num_items(self) -> int:
        """Items that are evaluated."""
        limit = self.entry.limit
        sizes = [len(task.eval_docs) for task in self.tasks.values()]
        return sum(size if limit is None else min(size, limit) for size in sizes)

    def describe(self) -> str:
        """For people: `piqa, 500 items, 0 shots, acc_norm`."""
        shots = sorted({task.get_config("num_fewshot") for task in self.tasks.values()})
        of = f" of {len(self.tasks)} tasks" if len(self.tasks) > 1 else ""
        told = " or ".join(map(str, shots))
        return (
            f"{self.name}: {self.num_items:,} items{of}, {told} {'shot' if told == '1' else 'shots'}, "
            f"{self.metric}"
        )


@dataclass(frozen=True)
class Checked:
    """What could be found out about the tasks of a study before it starts."""

    benchmarks: tuple[Benchmark, ...] = ()
    unchecked: tuple[str, ...] = ()
    """Sentences: what could not be reached, and so is not checked yet."""
    folders: tuple[str, ...] = ()
    """Those of the harness's own tasks that these are in: `load` looks no further."""


def check(settings: EvaluateConfig, *, may_be_offline: bool = False, known: Sequence[str] = ()) -> Checked:
    """Load all tasks, to find out what is wrong with them.

    Args:
        may_be_offline: data that the hub does not give now, and the local cache lacks, is no error.
        known: `Checked.folders` of an earlier look at the same tasks.
    Raises:
        ConfigError: the harness is not installed, or as `load`.
    """
    if not settings.tasks:
        return Checked()
    check_installed()
    found: list[Benchmark] = []
    unchecked: list[str] = []
    folders: set[str] = set()
    with quiet(), _hub_asked_once(settings) as online:
        for index, task in enumerate(settings.tasks):
            manager = _manager_for(settings, index, task, known)
            folders |= _folders_of(manager, task.name)
            try:
                found += _load_one(manager, index, task)
            except ConfigError as error:
                if online or not may_be_offline or not _is_about_data(error):
                    raise
                unchecked.append(
                    f"{task.name} is not checked: the hub does not answer, and the local cache does not have "
                    "its data"
                )
    _refuse_doubles(found)
    return Checked(tuple(found), tuple(unchecked), tuple(sorted(folders)))


def load(settings: EvaluateConfig, known: Sequence[str] = ()) -> tuple[Benchmark, ...]:
    """The tasks of a study, ready to run; loaded once in a process.

    Args:
        known: as `check` has it.
    Raises:
        ConfigError: there is no such task, its data cannot be read, it has no such metric, or it is one that
            raydisp does not run.
    """
    return _load(settings.model_dump_json(include={"tasks", "task_paths"}), tuple(known))


@functools.lru_cache(maxsize=1)
def _load(settings_json: str, known: tuple[str, ...]) -> tuple[Benchmark, ...]:
    return check(EvaluateConfig.model_validate_json(settings_json), known=known).benchmarks


def evaluated_steps(study: StudyConfig, trial: TrialConfig, *, at_rungs: bool = True) -> set[int]:
    """The steps after which a trial is evaluated on its tasks."""
    from raydisp.search.stopping import brackets

    rungs = {tokens for rungs in brackets(study) for tokens in rungs} if at_rungs else set()
    return {0, trial.num_steps} | {tokens // trial.train.global_batch_tokens for tokens in rungs}


# --- one entry of the file ------------------------------------------------------------------------------


def _where(index: int, task: Task) -> str:
    return f'evaluate.tasks[{index}] = "{task.name}"'


def _load_one(manager: Any, index: int, task: Task) -> list[Benchmark]:
    where = _where(index, task)
    try:
        loaded = manager.load([task.name])
    # Whatever a task's file, its functions and its data come to, the study cannot start with it.
    except Exception as error:
        raise ConfigError(
            f"{where} cannot be loaded: {type(error).__name__}: {hub.one_line(error)}; mend the task or its "
            "data, or take it out of the list"
        ) from error
    for name, one in loaded["tasks"].items():
        _refuse_unsafe(where, name, one)
        _set_shots(where, name, one, task.num_fewshot)
    return [
        _benchmark(where, name, task, {"tasks": tasks, "groups": groups})
        for name, tasks, groups in _parts(task.name, loaded)
    ]


def _parts(name: str, loaded: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """What has a value of its own: a group that averages its tasks, else each task for itself."""
    group = loaded["groups"].get(name)
    if group is not None and group.has_aggregation:
        yield name, loaded["tasks"], loaded["groups"]
        return
    for one, task in loaded["tasks"].items():
        yield one, {one: task}, {}


def _benchmark(where: str, name: str, entry: Task, loaded: dict[str, Any]) -> Benchmark:
    group = loaded["groups"].get(name)
    known: dict[str, bool | None] = {}
    for task in loaded["tasks"].values():
        directions = task.higher_is_better()
        for metric in task.aggregation():
            known.setdefault(metric, directions.get(metric))
    if group is not None:
        averaged = [one.metric for one in group.aggregate_metric_list]
        known = {metric: known.get(metric) for metric in averaged}
    metric = entry.metric
    if metric is None:
        metric = next((one for one in PREFERRED_METRICS if one in known), next(iter(known), None))
    if metric is None or metric not in known:
        of = "" if name == entry.name else f" of {name}"
        allowed = ", ".join(known) or "none at all"
        raise ConfigError(
            f'{where}: metric = "{entry.metric}" is not one{of}: it has {allowed}; name one of these.'
            f"{suggest(entry.metric or '', known)}"
        )
    return Benchmark(name, entry, loaded, metric, known[metric])


def _refuse_unsafe(where: str, name: str, task: Any) -> None:
    of = "" if f'"{name}"' in where else f" ({name})"
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(
            f"{where}{of} runs code that the model writes, which raydisp does not do; take it out of the list"
        )
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"{where}{of} shows images or plays sounds, and models here read text; take it out")


def _set_shots(where: str, name: str, task: Any, num_fewshot: int | None) -> None:
    own = task.get_config("num_fewshot")
    if num_fewshot is None:
        task.set_config("num_fewshot", own or 0)
    elif own == 0 and num_fewshot != 0:
        # The harness would go on without examples, and only log it.
        raise ConfigError(
            f"{where}: num_fewshot = {num_fewshot}, but {name} says itself that it has none; leave it out"
        )
    else:
        task.set_config("num_fewshot", num_fewshot)


def _refuse_doubles(benchmarks: Sequence[Benchmark]) -> None:
    """Rows are named after tasks."""
    owners: dict[str, Benchmark] = {}
    for benchmark in benchmarks:
        for name in [*benchmark.tasks, *benchmark.loaded["groups"]]:
            other = owners.setdefault(name, benchmark)
            if other is not benchmark:
                raise ConfigError(
                    f"evaluate.tasks: {name} belongs to {other.entry.name} and to {benchmark.entry.name}; "
                    "keep one of them"
                )


# --- where tasks are found --------------------------------------------------------------------------------


def _manager_for(settings: EvaluateConfig, index: int, task: Task, known: Sequence[str]) -> Any:
    """A TaskManager that knows the task.

    Args:
        known: as `check` has it.
    """
    name = task.name
    for path in settings.task_paths:
        if not Path(path).is_dir():
            raise ConfigError(
                f'evaluate.task_paths: "{path}" is no folder; relative paths start where the command is run '
                f"({Path.cwd()})"
            )
    folders = tuple(str(Path(path).absolute()) for path in settings.task_paths)
    own = _manager(folders, include_defaults=False) if folders else None
    # Reading all of the harness's own files, some fourteen thousand, takes ten seconds and more.
    few = [own] if own is not None else []
    if known:
        # Of two tasks of a name the first in the order of folders counts there, and the last here.
        harness = [str(_harness_tasks() / folder) for folder in sorted(known, reverse=True)]
        few.append(_manager((*harness, *folders), include_defaults=False))
    for manager in few:
        if name in manager.task_index and _knows_its_members(manager, name):
            return manager
    manager = _manager(folders, include_defaults=True)
    if name not in manager.task_index:
        also = f" or in the YAML files of {', '.join(settings.task_paths)}" if folders else ""
        near = suggest(name, [*(own.task_index if own is not None else ()), *manager.task_index])
        raise ConfigError(
            f"{_where(index, task)} is not a task, tag or group of lm-evaluation-harness "
            f"{_harness_version()}{also}; `lm-eval ls tasks` lists them.{near}"
        )
    return manager


@functools.lru_cache(maxsize=4)
def _manager(folders: tuple[str, ...], *, include_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders) or None, include_defaults=include_defaults)


def _knows_its_members(manager: Any, name: str) -> bool:
    """Whether what a group names is there too: it may be made of tasks that are elsewhere."""
    return all(
        one in manager.task_index and _knows_its_members(manager, one)
        for one in _members(manager.task_index[name])
    )


def _members(entry: Any) -> list[str]:
    """Names that an entry of the harness's index stands for; [] for a task itself."""
    return [*entry.tags] if entry.kind.name == "TAG" else _named_in((entry.cfg or {}).get("task"))


def _named_in(members: Any) -> list[str]:
    """Names in the list of a group, those of groups within it included."""
    names: list[Any] = []
    for member in members if isinstance(members, list) else []:
        inner = member.get("task", member.get("group")) if isinstance(member, dict) else member
        names += _named_in(inner) if isinstance(inner, list) else [inner]
    return [name for name in names if isinstance(name, str)]


def _folders_of(manager: Any, name: str) -> set[str]:
    """Folders, relative to the harness's tasks, of an entry and all that it is made of; no others."""
    entry = manager.task_index.get(name)
    if entry is None:
        return set()
    found = {folder for one in _members(entry) for folder in _folders_of(manager, one)}
    if entry.yaml_path is not None and entry.yaml_path.is_relative_to(_harness_tasks()):
        found.add(str(entry.yaml_path.parent.relative_to(_harness_tasks())))
    return found


def _harness_tasks() -> Path:
    """Folder of all tasks that come with the harness."""
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


def _harness_version() -> str:
    import importlib.metadata

    return importlib.metadata.version("lm_eval")


# --- without a network --------------------------------------------------------------------------------------


@contextlib.contextmanager
def _hub_asked_once(settings: EvaluateConfig) -> Iterator[bool]:
    """Whether data of the hub can be had; where it cannot, the cache answers at once.

    transformers, datasets and huggingface_hub would each try for half a minute, for every task.
    """
    if not _needs_hub(settings) or hub.answers():
        yield True
        return
    import datasets
    import huggingface_hub

    places = [(huggingface_hub.constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")]
    before = [getattr(place, name) for place, name in places]
    try:
        for place, name in places:
            setattr(place, name, True)
        yield False
    finally:
        for (place, name), value in zip(places, before, strict=True):
            setattr(place, name, value)


def _needs_hub(settings: EvaluateConfig) -> bool:
    """Whether any task may have data that is neither a local file nor made by a function of its own."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    folders = tuple(str(Path(path).absolute()) for path in settings.task_paths if Path(path).is_dir())
    own = _manager(folders, include_defaults=False).task_index if folders else {}
    for task in settings.tasks:
        entry = own.get(task.name)
        config = (entry.cfg or {}) if entry is not None else {}
        source = config.get("dataset_path")
        if not isinstance(source, str) or not (source in _PACKAGED_DATASETS_MODULES or Path(source).exists()):
            return True
    return False


def _is_about_data(error: BaseException) -> bool:
    """Whether what went wrong is that data of the hub was not to be had."""
    from huggingface_hub import errors as hub_errors

    cause = error.__cause__
    while cause is not None:
        if isinstance(
            cause, ConnectionError | hub_errors.OfflineModeIsEnabled | hub_errors.LocalEntryNotFoundError
        ):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


# --- what the harness does to its process -----------------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The harness prints, logs and draws bars while it works; here only its errors are heard."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    nowhere = io.StringIO()
    try:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def seeded(device: Any) -> Iterator[None]:
    """Generators as the harness's command seeds them, for tasks that draw; afterwards they are as before.

    Args:
        device: torch.device of the model.
    """
    import torch

    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        random.seed(PYTHON_SEED)
        np.random.seed(OTHER_SEED)
        torch.manual_seed(OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
