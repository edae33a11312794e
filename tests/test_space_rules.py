"""What the search section may say: every rule by its sentence, at its line, and every feature read back."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
import yaml

from raydisp.config import StudyConfig
from raydisp.errors import ConfigError
from raydisp.studyfile import differences, dump_study, parse_study

HEAD = """\
name: x
model: {source: scratch, num_layers: 2, hidden_size: 16, num_heads: 2, vocab_size: 320}
data: {source: python_docs, context_length: 16}
train: {budget_tokens: 1280, global_batch_tokens: 128, learning_rate: 0.01}
evaluate: {every_tokens: 256, max_tokens: 256}
search:
  num_trials: 4
"""
SPACE = """\
  space:
    dispersion.weight: {low: 0.01, high: 2.0, log: true}
    dispersion.layers: [all, last, [1]]
"""
LAYERS_FIRST = """\
  space:
    dispersion.layers: [all, last, [1]]
    dispersion.weight: {low: 0.01, high: 2.0, when: {dispersion.layers: [all]}}
"""
RANGES = """\
  space:
    dispersion.weight: {low: 0.01, high: 2.0}
    train.warmup_frac: {low: 0.0, high: 0.5}
"""


def complain(text: str, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_study(text, "f.yaml", overrides)
    return str(caught.value)


def space_of(*lines: str) -> str:
    return "  space:\n" + "".join(f"    {line}\n" for line in lines)


WHEN = "dispersion.weight: {low: 0.1, high: 1, when: "
MISTAKES = {
    # what follows HEAD (7 lines) -> line, sentence
    "not searchable": (space_of("seed: [1, 2]"), 9, "seed is the same in all trials of a study"),
    "no field": (space_of("dispersion.wieght: [1]"), 9, 'Did you mean "dispersion.weight"?'),
    "range of words": (space_of("dispersion.variant: {low: 1, high: 2}"), 9, "is not a number; give a list"),
    "not whole": (space_of("model.num_layers: {low: 1.5, high: 3}"), 9, ".low = 1.5 is not a whole number"),
    "step not whole": (
        space_of("model.num_layers: {low: 1, high: 3, step: 0.5}"),
        9,
        ".step = 0.5 is not a whole number",
    ),
    "step too wide": (
        space_of("dispersion.weight: {low: 0.5, high: 1, step: 2}"),
        9,
        "step = 2 is more than from low = 0.5 to high = 1; lower it",
    ),
    "step of 0": (space_of("dispersion.weight: {low: 0.5, high: 1, step: 0}"), 9, "step = 0 is not above 0"),
    "log and step": (
        space_of("dispersion.weight: {low: 0.5, high: 1, step: 0.1, log: true}"),
        9,
        "log and step exclude each other",
    ),
    "log of 0": (space_of("dispersion.weight: {low: 0, high: 1, log: true}"), 9, "must be above 0"),
    "no range": (space_of("dispersion.weight: {low: 1, high: 1}"), 9, "low = 1 is not below high = 1"),
    "twice": (space_of("dispersion.layers: [all, all]"), 9, "names a value twice"),
    "twice in two spellings": (space_of("dispersion.weight: [1, 1.0]"), 9, "names a value twice"),
    "not allowed": (space_of("train.beta1: {low: 0.5, high: 1.5}"), 9, ".high = 1.5 is not allowed: "),
    "choice not allowed": (
        space_of("dispersion.layers: {choices: [all, lasst]}"),
        9,
        'search.space["dispersion.layers"][1] = "lasst" is not allowed: ',
    ),
    "no choices": (space_of("dispersion.layers: {choices: []}"), 9, "is not a list with at least one entry"),
    "empty": ("  space: {}\n", 8, "is empty: there is nothing to search"),
    "when after": (
        space_of(WHEN + "{dispersion.layers: [all]}}", "dispersion.layers: [all, last]"),
        9,
        'search.space["dispersion.weight"].when looks at "dispersion.layers", which stands after it: move it '
        "up; it is the first.",
    ),
    "when of a range": (
        space_of("train.beta1: {low: 0.1, high: 0.5}", WHEN + "{train.beta1: [0.1]}}"),
        10,
        'looks at "train.beta1", which is a range; a condition needs a list of values',
    ),
    "when of nothing": (
        space_of("dispersion.layers: [all, last]", WHEN + "{dispersion.layer: [all]}}"),
        10,
        'looks at "dispersion.layer", which is not searched; before it stand dispersion.layers. Did you mean '
        '"dispersion.layers"?',
    ),
    "when of itself": (space_of(WHEN + "{dispersion.weight: [1]}}"), 9, "which stands after it"),
    "when of no value": (
        space_of("dispersion.layers: [all, last]", WHEN + "{dispersion.layers: [lasst]}}"),
        10,
        '.when["dispersion.layers"] = "lasst" is not one of its values (all, last)',
    ),
    "when is no list": (
        space_of("dispersion.layers: [all, last]", WHEN + "{dispersion.layers: all}}"),
        10,
        '["dispersion.layers"] = "all" is not a list',
    ),
    "when is no mapping": (space_of(WHEN + "5}"), 9, ".when = 5 is not a mapping of keys to values"),
    "cma-es of one": (
        space_of("dispersion.weight: {low: 0.1, high: 1}") + "  sampler: cma-es\n",
        10,
        "needs at least two searched fields",
    ),
    "cma-es of a list": (
        SPACE + "  sampler: cma-es\n",
        11,
        "needs a space of ranges, and dispersion.layers is a list of values",
    ),
    "grid of a range": (
        space_of("train.beta1: {low: 0.1, high: 0.5}", WHEN + "{}}") + "  sampler: grid\n",
        11,
        "grid needs values one by one, and train.beta1 is a range without steps",
    ),
    "cma-es of two objectives": (
        RANGES + "  sampler: cma-es\n  objective: [{metric: val_loss}, {metric: spearman}]\n",
        11,
        "search.sampler = cma-es follows one objective, and there are several",
    ),
    "grid too small": (
        space_of("dispersion.layers: [all, last]") + "  sampler: grid\n",
        7,
        "search.num_trials = 4 is more than the 2 combinations of the grid",
    ),
    "grid too large": (
        space_of(
            "model.vocab_size: {low: 300, high: 900}", "model.hidden_size: {low: 2, high: 1000, step: 2}"
        )
        + "  sampler: grid\n",
        11,
        "grid has up to 300,500 combinations, more than 100,000",
    ),
    "points of a grid": (
        space_of("dispersion.layers: [all, last, [1], [2]]")
        + "  sampler: grid\n  points_to_evaluate: [{dispersion.layers: all}]\n",
        11,
        "which visits every point anyway",
    ),
    "point of no field": (
        SPACE + "  points_to_evaluate:\n  - {dispersion.weight: 1}\n  - {dispersion.wieght: 1}\n",
        13,
        'search.points_to_evaluate[1] names "dispersion.wieght", which is not in search.space. Did you mean',
    ),
    "point outside": (
        SPACE + "  points_to_evaluate: [{dispersion.weight: 5}]\n",
        11,
        '[0]["dispersion.weight"] = 5 is outside search.space (0.01 to 2, logarithmic)',
    ),
    "point of another kind": (
        SPACE + "  points_to_evaluate: [{dispersion.weight: true}]\n",
        11,
        '[0]["dispersion.weight"] = true is outside search.space',
    ),
    "point off its condition": (
        LAYERS_FIRST + "  points_to_evaluate: [{dispersion.layers: [1], dispersion.weight: 1}]\n",
        11,
        'gives "dispersion.weight", which is searched only where dispersion.layers is all, and it is [1]; '
        "leave it out",
    ),
    "points are no list": (SPACE + "  points_to_evaluate: {dispersion.weight: 1}\n", 11, "is not a list"),
    "warm start": (SPACE + "  warm_start: results/a\n", 11, 'warm_start = "results/a" is not a list'),
    "scheduler by name": (
        SPACE + "  scheduler: asha\n",
        11,
        'search.scheduler: "asha" is not none or one of asha, hyperband, median with its settings, such as '
        "{asha: {grace_tokens: 50_000, reduction_factor: 3}} (it needs at least grace_tokens: {asha: "
        "{grace_tokens: ...}})",
    ),
    "scheduler of none": (SPACE + "  scheduler: {}\n", 11, "is not none or one of asha, hyperband, median"),
    "scheduler null": (SPACE + "  scheduler: null\n", 11, "is not none or one of asha, hyperband, median"),
    "two schedulers": (
        SPACE + "  scheduler: {asha: {grace_tokens: 256}, median: {grace_tokens: 256}}\n",
        11,
        "is not none or one of asha, hyperband, median",
    ),
    "scheduler is a number": (
        SPACE + "  scheduler: {asha: 5}\n",
        11,
        "search.scheduler.asha = 5 is not a map",
    ),
    "factor": (
        SPACE + "  scheduler: {asha: {grace_tokens: 256, reduction_factor: 1}}\n",
        11,
        "search.scheduler.asha.reduction_factor = 1 is not at least 2",
    ),
    "watched": (
        SPACE + "  scheduler: {asha: {grace_tokens: 256, metric: train_loss}}\n",
        11,
        'search.scheduler.asha.metric = "train_loss" is not one of val_loss, ',
    ),
    "mode alone": (
        SPACE + "  scheduler:\n    asha: {grace_tokens: 256, mode: max}\n",
        12,
        "mode is given without a metric",
    ),
    "known at the end": (
        SPACE + "  objective: {metric: tokens_per_s}\n  scheduler:\n    asha: {grace_tokens: 256}\n",
        13,
        "search.scheduler.asha cannot watch tokens_per_s, which is known only at the end of a trial",
    ),
    "no watched": (
        SPACE
        + "  objective: [{metric: val_loss}, {metric: spearman}]\n"
        + "  scheduler: {median: {grace_tokens: 256}}\n",
        12,
        "search.scheduler.median.metric is missing: there are 2 objectives; name the one metric",
    ),
    "between evaluations": (
        SPACE + "  scheduler:\n    asha:\n      grace_tokens: 300\n",
        13,
        "search.scheduler.asha.grace_tokens = 300 is not a multiple of the 256 tokens between two "
        "evaluations; the nearest that is: 256 or 512",
    ),
    "below the first": (
        SPACE + "  scheduler: {hyperband: {grace_tokens: 128}}\n",
        11,
        "search.scheduler.hyperband.grace_tokens = 128 is not a multiple of the 256 tokens between two "
        "evaluations; the nearest that is: 256",
    ),
    "beyond the budget": (
        SPACE + "  scheduler: {median: {grace_tokens: 1280}}\n",
        11,
        "grace_tokens = 1280 is not below train.budget_tokens = 1280, so no trial would ever be stopped",
    ),
    "batches as a range": (
        space_of("train.global_batch_tokens: {low: 128, high: 256, step: 128}")
        + "  scheduler: {asha: {grace_tokens: 256}}\n",
        9,
        "compares trials at equal tokens, which they then do not reach",
    ),
    "batches that do not divide": (
        space_of("train.global_batch_tokens: [128, 192]") + "  scheduler: {asha: {grace_tokens: 256}}\n",
        9,
        "evaluate.every_tokens = 256 is no multiple of train.global_batch_tokens = 192",
    ),
    "objective": (
        SPACE + "  objective: {metric: val_los}\n",
        11,
        'search.objective.metric = "val_los" is not one of val_loss, ',
    ),
    "objective in a list": (
        SPACE + "  objective:\n  - {metric: val_loss}\n  - {metric: val_los}\n",
        13,
        'search.objective[1].metric = "val_los" is not one of val_loss, ',
    ),
    "objective is a word": (
        SPACE + "  objective: val_loss\n",
        11,
        'search.objective = "val_loss" is not a map',
    ),
    "no objective": (SPACE + "  objective: []\n", 11, "is not a list with at least one entry"),
    "five objectives": (
        SPACE
        + "  objective: [{metric: val_loss}, {metric: spearman}, {metric: kendall}, {metric: train_s}, {}]\n",
        11,
        "is not a list with at most 4 entries",
    ),
    "objective twice": (
        SPACE + "  objective: [{metric: kendall}, {metric: kendall, mode: max}]\n",
        11,
        "search.objective names kendall twice",
    ),
    "stop_when is a number": (SPACE + "  stop_when: 5\n", 11, "search.stop_when = 5 is not a mapping"),
    "stop_when of which": (
        SPACE
        + "  objective: [{metric: val_loss}, {metric: spearman}]\n  stop_when: {no_improvement_trials: 5}\n",
        12,
        "search.stop_when.metric is missing: there are 2 objectives; name the one whose improvement counts "
        "(val_loss, spearman)",
    ),
    "stop_when of another": (
        SPACE + "  stop_when: {no_improvement_trials: 5, metric: spearman}\n",
        11,
        "search.stop_when.metric = spearman is not an objective of the search (val_loss)",
    ),
    "no tokens": (SPACE + "  max_tokens_total: 0\n", 11, "search.max_tokens_total = 0 is not at least 1"),
    "no hours": (SPACE + "  max_hours: 0\n", 11, "search.max_hours = 0 is not above 0"),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_each_mistake_has_its_sentence_and_its_line(mistake: str) -> None:
    text, line, sentence = MISTAKES[mistake]
    message = complain(HEAD + text)
    assert sentence in message
    assert message.startswith(f"f.yaml:{line}: ")
    assert "\n" not in message, "one mistake, one sentence"


def test_a_scheduler_needs_evaluations() -> None:
    text = HEAD.replace("every_tokens: 256", "every_tokens: null") + SPACE
    message = complain(text + "  scheduler: {asha: {grace_tokens: 256}}\n")
    assert message.startswith("f.yaml:11: search.scheduler.asha decides at evaluations, and ")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            space_of("dispersion.weight: {low: 1, high: 2, lgo: true}"),
            '"lgo" is not a key in search.space["dispersion.weight"]; allowed: low, high, log, step, when.',
        ),
        (
            space_of("dispersion.layers: {choices: [all], whne: {}}"),
            '"whne" is not a key in search.space["dispersion.layers"]; allowed: choices, when. Did you mean '
            '"when"?',
        ),
        (
            SPACE + "  scheduler: {asha: {grace_tokens: 256, grace: 1}}\n",
            '"grace" is not a key in search.scheduler.asha; allowed: grace_tokens, metric, mode, '
            "reduction_factor.",
        ),
        (
            SPACE + "  scheduler: {median: {grace_tokens: 256, startup_trials: 1}}\n",
            '"startup_trials" is not a key in search.scheduler.median; allowed: grace_tokens, metric, mode, '
            'num_startup_trials. Did you mean "num_startup_trials"?',
        ),
        (
            SPACE + "  objective: [{metrik: val_loss}]\n",
            '"metrik" is not a key in search.objective[0]; allowed: metric, mode. Did you mean "metric"?',
        ),
        (
            SPACE + "  objective: {metrik: val_loss}\n",
            '"metrik" is not a key in search.objective; allowed: metric, mode. Did you mean "metric"?',
        ),
        (
            SPACE + "  stop_when: {no_improvement_trials: 1, min_improvment: 1}\n",
            '"min_improvment" is not a key in search.stop_when; allowed: no_improvement_trials, '
            'min_improvement, metric. Did you mean "min_improvement"?',
        ),
        (SPACE + "  scheduller: none\n", '"scheduller" is not a key in search; allowed: num_trials, '),
    ],
)
def test_an_unknown_key_is_told_with_those_that_are_known(text: str, sentence: str) -> None:
    message = complain(HEAD + text)
    assert sentence in message
    assert "\n" not in message


def test_a_missing_and_an_unknown_key_are_told_both() -> None:
    missing, unknown = complain(HEAD + SPACE + "  scheduler: {asha: {grace: 1}}\n").splitlines()
    assert missing == "f.yaml:11: search.scheduler.asha.grace_tokens is missing; add it"
    assert unknown.startswith('f.yaml:11: "grace" is not a key in search.scheduler.asha')


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("search.scheduler.asha.grace_tokens=512", {"scheduler": {"asha": {"grace_tokens": 512}}}),
        ("search.space.dispersion.weight.when={dispersion.layers: [all]}", {}),
        ("search.objective=[{metric: kendall}]", {"objective": [{"metric": "kendall"}]}),
        ("search.stop_when.no_improvement_trials=3", {"stop_when": {"no_improvement_trials": 3}}),
    ],
)
def test_overrides_reach_the_new_sections(override: str, found: dict[str, Any]) -> None:
    study = parse_study(HEAD + LAYERS_FIRST, "f.yaml", [override])
    dumped = study.model_dump(mode="json", exclude_defaults=True)["search"]
    for name, value in found.items():
        assert dumped[name] == value
    assert dumped["space"]["dispersion.weight"]["when"] == {"dispersion.layers": ["all"]}


def test_a_mistake_in_an_override_names_it() -> None:
    message = complain(HEAD + SPACE, ("search.scheduler.asha.grace_tokens=300",))
    assert message.startswith("--set search.scheduler.asha.grace_tokens: search.scheduler.asha.grace_tokens")
    message = complain(HEAD + SPACE, ("search.space.dispersion.weight.when={dispersion.layers: [all]}",))
    assert message.startswith('--set search.space["dispersion.weight"].when: ')


FEATURES = {
    "none": SPACE + "  scheduler: none\n",
    "asha": SPACE + "  scheduler: {asha: {grace_tokens: 256, reduction_factor: 2}}\n",
    "hyperband": SPACE + "  scheduler: {hyperband: {grace_tokens: 256, metric: kendall, mode: max}}\n",
    "median": SPACE + "  scheduler: {median: {grace_tokens: 512, num_startup_trials: 2}}\n",
    "conditions": LAYERS_FIRST.replace("[all, last, [1]]", "{choices: [all, last, [1]]}"),
    "points": SPACE + "  points_to_evaluate: [{dispersion.weight: 1}, {dispersion.layers: [1]}, {}]\n",
    "ends": SPACE
    + "  max_tokens_total: 1e6\n  max_hours: 2\n"
    + "  stop_when: {no_improvement_trials: 3, min_improvement: 0.1}\n",
    "several": SPACE + "  objective: [{metric: val_loss}, {metric: tokens_per_s}]\n  warm_start: [a, b]\n",
    "a list of one": SPACE + "  objective: [{metric: spearman, mode: max}]\n",
    "grid": space_of("dispersion.weight: {low: 0.1, high: 0.5, step: 0.1}") + "  sampler: grid\n",
    "cma-es": RANGES + "  sampler: cma-es\n",
    "qmc": LAYERS_FIRST + "  sampler: qmc\n",
    "batches": space_of("train.global_batch_tokens: [64, 128]")
    + "  scheduler: {asha: {grace_tokens: 256}}\n",
}


@pytest.mark.parametrize("feature", list(FEATURES))
def test_the_resolved_file_reads_back_equal_and_fits_the_schema(feature: str) -> None:
    study = parse_study(HEAD + FEATURES[feature], "f.yaml")
    text = dump_study(study)
    again = parse_study(text, "g.yaml")
    assert again == study
    assert differences(study, again) == []
    schema = StudyConfig.model_json_schema()
    jsonschema.validate(yaml.safe_load(text), schema)
    assert study.search.model_dump(mode="json", exclude_defaults=True) == (
        again.search.model_dump(mode="json", exclude_defaults=True)
    )


def test_the_schema_refuses_what_the_rules_of_types_refuse() -> None:
    tree = yaml.safe_load(dump_study(parse_study(HEAD + FEATURES["asha"], "f.yaml")))
    schema = StudyConfig.model_json_schema()
    tree["search"]["scheduler"] = {"asha": {"grace": 1}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tree, schema)


def test_modes_of_metrics() -> None:
    several = parse_study(HEAD + FEATURES["several"], "f.yaml").search
    assert [(one.metric, one.mode) for one in several.objectives] == [
        ("val_loss", "min"),
        ("tokens_per_s", "max"),
    ]
    assert several.primary.metric == "val_loss"
    watched = parse_study(HEAD + FEATURES["hyperband"], "f.yaml").search.watched
    assert (watched.metric, watched.mode) == ("kendall", "max")
    text = HEAD + SPACE + "  objective: {metric: kendall, mode: max}\n"
    for metric in ("", ", metric: kendall"):
        search = parse_study(
            text + f"  scheduler: {{asha: {{grace_tokens: 256{metric}}}}}\n", "f.yaml"
        ).search
        assert (search.watched.metric, search.watched.mode) == ("kendall", "max"), "as the objective has it"


@pytest.mark.parametrize(
    ("feature", "override", "changed"),
    [
        ("asha", "search.num_trials=9", None),
        ("asha", "search.max_tokens_total=5e6", None),
        ("asha", "search.max_hours=1", None),
        ("asha", "search.stop_when={no_improvement_trials: 9}", None),
        ("ends", "search.stop_when=null", None),
        ("asha", "evaluate.every_tokens=128", None),
        ("median", "evaluate.every_tokens=128", "evaluate.every_tokens (256 -> 128)"),
        ("median", "evaluate.num_log_spaced=5", None),
        ("asha", "search.scheduler=none", "search.scheduler"),
        (
            "asha",
            "search.scheduler.asha.reduction_factor=3",
            "search.scheduler.asha.reduction_factor (2 -> 3)",
        ),
        ("none", "search.sampler=qmc", 'search.sampler ("tpe" -> "qmc")'),
        ("none", "search.objective.metric=kendall", 'search.objective.metric ("val_loss" -> "kendall")'),
        ("points", "search.points_to_evaluate=[]", "search.points_to_evaluate"),
        ("several", "search.warm_start=[a]", "search.warm_start"),
        ("qmc", "search.space.dispersion.weight.when={dispersion.layers: [last]}", "search.space"),
        ("none", "search.num_startup_trials=2", "search.num_startup_trials"),
    ],
)
def test_what_may_change_while_a_study_goes_on(feature: str, override: str, changed: str | None) -> None:
    earlier = parse_study(HEAD + FEATURES[feature], "f.yaml")
    later = parse_study(HEAD + FEATURES[feature], "f.yaml", [override])
    assert earlier != later
    found = differences(earlier, later)
    if changed is None:
        assert found == []
    else:
        assert found
        assert all(text.startswith(changed) for text in found), found
