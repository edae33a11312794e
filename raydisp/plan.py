"""What a study is going to do, found out before anything starts or is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from raydisp.arms import Arms, dimensions, is_dimension
from raydisp.cluster.capacity import Offer
from raydisp.cluster.node_checks import Needs
from raydisp.cluster.packing import Plan, plan_resources
from raydisp.cluster.session import joins_cluster, memory_here, this_machine
from raydisp.config import StudyConfig
from raydisp.config.model import PathModel, ScratchModel
from raydisp.config.search import Median, choices_of
from raydisp.confirm.planning import describe as describe_confirm
from raydisp.confirm.planning import known_spread, num_arms, num_seeds
from raydisp.confirm.planning import warnings as confirm_warnings
from raydisp.confirm.runs import Work, read_work
from raydisp.data import cache_folder, check_data
from raydisp.data.corpus import CorpusSummary
from raydisp.errors import ConfigError, RaydispError
from raydisp.layers import resolve_layers
from raydisp.models import ModelSummary, load_tokenizer, model_summary, ties_embeddings
from raydisp.search import space
from raydisp.search.stopping import brackets, expected_frac, full_tokens
from raydisp.search.warm_start import WarmStart, read_warm_starts
from raydisp.tasks.loading import Checked, check, evaluated_steps
from raydisp.trial_words import (
    count,
    describe_dispersion,
    describe_embeddings,
    describe_evaluations,
    describe_model,
    describe_teacher,
    describe_training,
    num_evaluations,
    rounded,
)
from raydisp.vocabulary import check_shared_vocabulary

_T = TypeVar("_T")


@dataclass(frozen=True)
class StudyPlan:
    """The plan of a study on the machines that it will run on."""

    study: StudyConfig
    study_dir: str
    work: Work
    model: ModelSummary | None
    """None: the hub was not there to tell."""
    corpus: CorpusSummary
    resources: Plan | None
    """None where a cluster is joined that has not been asked yet."""
    warm_starts: list[WarmStart]
    forgets_head: bool = False
    """Active forgetting would draw the output head anew too: it shares the input embeddings' weight."""

    cluster: Offer | None = None
    """The cluster that was asked; None: it is this machine, or was not."""

    teacher: ModelSummary | None = None
    """Of `distillation.teacher`; None: there is none, or the hub was not there to tell."""
    tasks: Checked = field(default_factory=Checked)
    """Benchmarks, as far as they could be looked at."""
    unchecked: tuple[str, ...] = ()
    """What could not be looked at, because the hub does not answer: sentences."""

    def needs(self, lease_id: str | None) -> Needs:
        """What every node of a cluster must have.

        Args:
            lease_id: of the results folder; None: nothing is to be written.
        """
        return Needs(
            study_dir=self.study_dir,
            lease_id=lease_id,
            cache_dir=cache_folder(self.study.output),
            data_bytes=self._corpus_bytes // 2,
            uses_tasks=bool(self.study.evaluate.tasks),
        )

    @property
    def _corpus_bytes(self) -> int:
        """Of text; 0 where it is not known."""
        return self.corpus.num_bytes or 0

    def headline(self) -> str:
        """One line: what is about to run."""
        study, model = self.study, self.model
        size = "of a size not known yet" if model is None else f"{rounded(model.num_parameters)} parameters"
        return (
            f"{study.name}: {count(self.work.num_trials(study), 'trial')} to run "
            f"({self._count_trials()}), "
            f"{study.num_steps:,} steps = {self._tokens_per_trial:,} tokens each, {size}."
        )

    def _count_trials(self) -> str:
        """What the whole study has: `8 search trials and the baseline in all`."""
        study, arms = self.study, Arms(self.study)
        if study.arms is None:
            text = f"{count(study.search.num_trials, 'search trial')} and the baseline"
        else:
            text = count(arms.num_trials, "search trial")
        if study.confirm is not None:
            m = num_arms(study)
            text += f", {count((m + 1) * num_seeds(study, m), 'confirm run')}"
        return f"{text} in all"

    @property
    def _tokens_per_trial(self) -> int:
        return full_tokens(self.study)

    def describe(self) -> str:
        """The plan in full, for --dry-run."""
        study, search = self.study, self.study.search
        lines = [
            ("study", f"{study.name} -> {self.study_dir}"),
            ("model", describe_model(study.model, self.model)),
            *[
                ("teacher" if index == 0 else "", text)
                for index, text in enumerate(describe_teacher(study, self.teacher))
            ],
            ("data", self._describe_corpus()),
            ("trials", self._describe_trials()),
            ("training", describe_training(study)),
            ("evaluation", describe_evaluations(study)),
            ("dispersion", describe_dispersion(study, self.model)),
            *[
                ("embeddings" if index == 0 else "", text)
                for index, text in enumerate(describe_embeddings(study))
            ],
            *[("tasks" if index == 0 else "", text) for index, text in enumerate(self._describe_tasks())],
            ("search", self._describe_search()),
            *[("", f"{name}: {space.describe(value)}") for name, value in search.space.items()],
            *[("arms" if index == 0 else "", text) for index, text in enumerate(self._describe_arms())],
            *[
                ("warm start" if index == 0 else "", told.describe())
                for index, told in enumerate(self.warm_starts)
            ],
            *[
                ("scheduler" if index == 0 else "", text)
                for index, text in enumerate(self._describe_scheduler())
            ],
            *[("ends early" if index == 0 else "", text) for index, text in enumerate(self._describe_ends())],
            *[("confirm" if index == 0 else "", text) for index, text in enumerate(describe_confirm(study))],
            (
                "resources",
                self.resources.describe()
                if self.resources
                else "of the cluster, asked when the study starts",
            ),
            *[("cluster" if index == 0 else "", text) for index, text in enumerate(self._describe_cluster())],
            ("disk", self._describe_disk()),
        ]
        warnings = self.warnings()
        lines += [("warning" if index == 0 else "", text) for index, text in enumerate(warnings)]
        lines += [("unchecked" if index == 0 else "", text) for index, text in enumerate(self.unchecked)]
        lines.append(("", "Dry run: nothing was started or written."))
        return "\n".join(f"{name:<11}{text}" for name, text in lines)

    def warnings(self) -> list[str]:
        """What is allowed but probably not meant."""
        search, searched = self.study.search, Arms(self.study).searched
        found = []
        if not searched:
            return [*self._model_warnings(), *confirm_warnings(self.study)]
        if search.sampler == "tpe" and search.startup_trials >= search.num_trials:
            found.append(
                f"search.num_startup_trials = {search.startup_trials} leaves TPE none of the "
                f"{search.num_trials} trials: the whole search is random"
            )
        if self.resources:
            at_a_time = -(-self.resources.max_concurrent_trials // len(searched))  # the arms take turns
            concurrency = concurrency_warning(self.study, at_a_time)
            found += [concurrency] if concurrency else []
        found += self._model_warnings()
        changing = [name for name in search.space if name.startswith("data.") or name == "model.vocab_size"]
        metrics = [one.metric for one in search.objectives]
        affected = [name for name in metrics if name in ("val_loss", "val_perplexity", "train_loss")]
        if changing and affected:
            found.append(
                f"{', '.join(changing)} changes what a token is or sees, so {affected[0]} does "
                "not compare between trials; val_bits_per_byte compares across tokenizers"
            )
        return [*found, *confirm_warnings(self.study)]

    def _model_warnings(self) -> list[str]:
        if not self.forgets_head:
            return []
        return [
            "active_forgetting draws the input embeddings anew, and the output head of this model shares "
            "their weight (tied), so that each reset loses the head too; an untied model keeps its head"
            + (" (model.tie_embeddings: false)" if self.study.model.source == "scratch" else "")
        ]

    def _describe_arms(self) -> list[str]:
        """What each arm sets and searches by itself."""
        lines = []
        for arm in Arms(self.study).all if self.study.arms is not None else []:
            told = [f"{name} = {value}" for name, value in arm.fixed.items()]
            own = arm.study.search.space
            told += [
                f"{name}: {space.describe(kind)}"
                for name, kind in own.items()
                if name not in self.study.search.space
            ]
            shared = [name for name in own if name in self.study.search.space]
            told += [f"and {', '.join(shared)} as above"] if shared else []
            number = self.study.search.num_trials if arm.searched else 1
            lines.append(f"{arm.name} ({count(number, 'trial')}): {'; '.join(told)}")
        return lines

    def _describe_search(self) -> str:
        study, search = self.study, self.study.search
        if not Arms(study).searched:
            return "nothing: each arm is one trial"
        objectives = " and ".join(f"{one.metric} ({one.mode})" for one in search.objectives)
        text = f"{search.sampler} on {objectives}, seed {study.seed}"
        if search.sampler == "tpe":
            text += f", the first {search.startup_trials} at random"
        if search.sampler == "grid":
            text += f", {search.num_trials} of {space.grid_size(study)} combinations"
        if search.points_to_evaluate:
            text += f"; {count(len(search.points_to_evaluate), 'given point')} first"
        return text

    def _describe_scheduler(self) -> list[str]:
        """The rungs, and what stopping trials at them saves."""
        study, search = self.study, self.study.search
        rule, watched = search.stopping, search.watched
        if rule is None or watched is None:
            return []
        full = self._tokens_per_trial
        lines = [f"{search.scheduler_name} on {watched.metric} ({watched.mode})"]
        if isinstance(rule, Median):
            points = brackets(study)[0]
            lines[0] += (
                f": from {points[0]:,} tokens on, at every evaluation ({count(len(points), 'time')}), once "
                f"{rule.num_startup_trials} trials have completed"
            )
            least = points[0] / full
            lines.append(f"a trial that is stopped takes {least:.0%} of a full one's tokens at least")
            return lines
        lines[0] += f": 1 of {rule.reduction_factor} goes on at each rung"
        for index, rungs in enumerate(brackets(study)):
            name = f"bracket {index + 1}: " if search.scheduler_name == "hyperband" else ""
            places = ", ".join(f"{tokens:,}" for tokens in rungs)
            lines.append(f"{name}{f'rungs at {places} of {full:,} tokens' if rungs else 'no rung'}")
        frac = expected_frac(study)
        if frac is not None:
            number = search.num_trials * len(Arms(study).searched)
            saved = (1 - frac) * full * number
            lines.append(
                f"expected saving: {1 - frac:.0%} of the search's tokens, {rounded(saved)} of "
                f"{rounded(full * number)} (in the long run; early trials have few to compete "
                "with)"
            )
        return lines

    def _describe_ends(self) -> list[str]:
        search, failed = self.study.search, self.study.failures.max_failed_trials
        lines = []
        if search.max_tokens_total is not None:
            room = search.max_tokens_total // self._tokens_per_trial
            lines.append(
                f"after {search.max_tokens_total:,} training tokens in all: {room} full trials, with the "
                "baseline"
            )
        if search.max_hours is not None:
            lines.append(f"after {search.max_hours:g} hours in which trials ran: no further one starts")
        if (rule := search.stop_when) is not None:
            metric = rule.metric or search.primary.metric
            by = f" by more than {rule.min_improvement:g}" if rule.min_improvement else ""
            lines.append(
                f"when {metric} has not improved{by} in {rule.no_improvement_trials} completed trials"
            )
        if failed is not None:
            lines.append(f"when more than {failed} trials have failed")
        return lines

    def _describe_corpus(self) -> str:
        corpus = self.corpus
        parts = [corpus.source]
        if corpus.num_documents is not None:
            parts.append(f"{corpus.num_documents:,} documents")
        if corpus.num_bytes is not None:
            parts.append(f"{corpus.num_bytes / 1e6:.2f} MB")
        if corpus.splits is not None:
            shares = [f"{name} {split.num_bytes / 1e6:.2f} MB" for name, split in corpus.splits.items()]
            parts.append(f"({', '.join(shares)})")
        return (
            ", ".join(parts).replace(", (", " (") + f"; sequences of {self.study.data.context_length} tokens"
        )

    def _describe_trials(self) -> str:
        agenda, to_run = self.work.search, self.work.num_trials(self.study)
        text = f"{self.study.search.num_trials} search trials + 1 baseline (dispersion.weight 0)"
        if self.study.arms is not None or self.study.confirm is not None:
            text = self._count_trials()
        done, open_ = list(agenda.finished), list(agenda.resumed)
        if self.work.confirm is not None:
            done, open_ = done + self.work.confirm.finished, open_ + self.work.confirm.resumed
        if done or open_:
            text += f"; {len(done)} done, {len(open_)} to go on, {to_run} to run"
        total = to_run * self._tokens_per_trial
        return f"{text}; {total:,} training tokens to come"

    def _describe_tasks(self) -> list[str]:
        """What models are evaluated on besides held-out text, and when."""
        if not self.study.evaluate.tasks:
            return []
        lines = [benchmark.describe() for benchmark in self.tasks.benchmarks] + [*self.tasks.unchecked]
        if not lines:
            return []
        rungs = len(evaluated_steps(self.study, self.study.trial)) - 2
        at_rungs = f", and at {count(rungs, 'rung')} of the search" if rungs else ""
        return [*lines, f"before and after training{at_rungs}"]

    def _describe_cluster(self) -> list[str]:
        """What there is, and what its autoscaler is going to start."""
        plan, offer = self.resources, self.cluster
        if plan is None or offer is None:
            return []
        cpus, gpus = plan.cpus_per_worker, plan.gpus_per_worker
        lines = [offer.describe(cpus, gpus)]
        if len(offer.nodes) > 1:
            lines.append(
                f"all {len(offer.nodes)} nodes have the same versions, and shared memory and disk enough"
            )
        if offer.growth is not None:
            concurrent = min(plan.max_concurrent_trials, self.work.num_trials(self.study))
            starts = offer.starts(concurrent * plan.num_workers, cpus, gpus)
            told = " and ".join(f"{count(number, 'node')} of {name}" for name, number in starts)
            lines.append(
                f"its autoscaler is going to start {told or 'no node'} for "
                f"{count(concurrent, 'trial')} at a time"
            )
        return lines

    def _describe_disk(self) -> str:
        study, model = self.study, self.model
        if model is None:
            return "not known without the size of the model"
        # Measured: a step row compresses to about 60 bytes, a layer row with its histogram to about 400.
        layers = num_evaluations(study) * (model.num_layers + 1)
        per_trial = 20_000 + 60 * study.num_steps + 400 * layers
        rows = per_trial * Arms(study).num_trials
        models = 0
        if study.confirm is not None:
            m = num_arms(study)
            n = num_seeds(study, m)
            rows += per_trial * (m + 1) * n
            kept = {"none": 0, "first_seed": m + 1, "all": (m + 1) * n}[study.confirm.keep_models]
            models = 4 * model.num_parameters * kept
        text = f"results about {_size(rows + 6_000_000)}"  # the report carries its plotting library
        if self._corpus_bytes:
            text += f", token blocks about {_size(self._corpus_bytes // 2)}"
        if models:
            text += f", confirmed models {_size(models)}"
        if study.checkpoint.every_tokens is not None:
            running = self.resources.max_concurrent_trials if self.resources else 1
            # float32 weights and two Adam moments; a new checkpoint stands beside the last and the best.
            each = 12 * model.num_parameters
            text += f", checkpoints at most {_size(3 * each * running)} at a time ({_size(each)} each)"
        return text


def concurrency_warning(study: StudyConfig, concurrent: int) -> str | None:
    """What is to be said of so many trials at a time; None: nothing.

    Where a cluster is joined the number is known only when the study starts.
    """
    search = study.search
    if search.sampler != "tpe" or search.startup_trials >= concurrent:
        return None
    return (
        f"{concurrent} trials run at a time, so the first {concurrent} learn from no result and are as good "
        f"as random, not {search.startup_trials} (search.num_startup_trials); lower "
        "resources.max_concurrent_trials if that matters"
    )


def make_plan(
    study: StudyConfig,
    study_dir: str,
    address: str | None,
    *,
    retry_failed: bool = False,
    dry_run: bool = False,
) -> StudyPlan:
    """Check everything that can be checked without starting Ray, and plan the study.

    Args:
        retry_failed: trials that failed are to be run again.
        dry_run: nothing is going to start: what only the hub knows (models, data, data of tasks) is left
            unchecked where it does not answer, and the plan says so.
    Raises:
        RaydispError: data, model, tasks or machines do not allow it.
    """
    resources = None
    if not joins_cluster(address):
        here = Offer((this_machine(),), head_memory_bytes=memory_here())
        resources = plan_resources(study, here, where="this machine")
    unchecked: list[str] = []

    def ask(find: Callable[[], _T]) -> _T | None:
        try:
            return find()
        except RaydispError as problem:
            if not (dry_run and problem.hub_unreachable):
                raise
            if str(problem) not in unchecked:
                unchecked.append(str(problem))
            return None

    model, teacher = _ask_models(study, ask)
    if model is not None:
        _check_layers(study, model)
    if isinstance(study.tokenizer_model, PathModel):
        load_tokenizer(study.tokenizer_model)
    corpus = ask(lambda: check_data(study.trial, cache_folder(study.output)))
    if study.confirm is not None:
        known_spread(study)  # now, and not when the search is over
    work = read_work(study, study_dir, retry_failed=retry_failed)
    # A study that has run already needs neither the harness nor its data to be reported.
    tasks = check(study.evaluate, may_be_offline=dry_run) if work.num_trials(study) else Checked()
    arms = [arm.study for arm in Arms(study).all]
    return StudyPlan(
        study,
        study_dir,
        work,
        model,
        corpus or CorpusSummary(f"{getattr(study.data, 'path', '')} from the hub", None, None, None),
        resources,
        read_warm_starts(study),
        forgets_head=bool(ask(lambda: any(_may_forget(one) and _may_be_tied(one) for one in arms))),
        teacher=teacher,
        tasks=tasks,
        unchecked=tuple(unchecked),
    )


def _ask_models(
    study: StudyConfig, ask: Callable[[Callable[[], Any]], Any]
) -> tuple[ModelSummary | None, ModelSummary | None]:
    """Sizes of the model and of its teacher, which must have one vocabulary; None: not known, or none."""
    model, section, context = study.model, study.distillation.teacher, study.data.context_length
    if section is None:
        return ask(lambda: model_summary(model, context)), None
    teacher: ModelSummary | None = ask(lambda: model_summary(section, context))
    if teacher is not None:
        ask(lambda: check_shared_vocabulary(study.trial))
    if isinstance(model, ScratchModel):
        if teacher is None:
            return None, None
        model = model.model_copy(update={"vocab_size": teacher.vocab_size})
    return ask(lambda: model_summary(model, context)), teacher


def _may_forget(study: StudyConfig) -> bool:
    return study.active_forgetting.every_steps is not None or (
        "active_forgetting.every_steps" in study.search.space
    )


def _may_be_tied(study: StudyConfig) -> bool:
    searched = choices_of(study.search.space.get("model.tie_embeddings", []))
    return any(searched) if searched else ties_embeddings(study.model)


def _check_layers(study: StudyConfig, model: ModelSummary) -> None:
    """Layer numbers of a pretrained model, whose depth the study file does not tell."""
    name = "dispersion.layers"
    places = [(name, study.dispersion.layers)]
    for arm, fields in (study.arms or {}).items():
        chosen: Any = fields.get(name)
        if chosen is not None:
            choices = (choices_of(chosen) or []) if is_dimension(chosen) else [chosen]
            places += [(f'arms.{arm}["{name}"]', choice) for choice in choices]
    if "model.num_layers" not in dimensions(study):
        choices = choices_of(study.search.space.get(name, [])) or []
        places += [(f'search.space["{name}"][{i}]', choice) for i, choice in enumerate(choices)]
    for place, choice in places:
        try:
            resolve_layers(choice, model.num_layers)
        except ValueError as error:
            raise ConfigError(f"{place}: {error}") from None


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
