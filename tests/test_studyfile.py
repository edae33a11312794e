"""Reading study files: what is accepted, and the sentence for each mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from raydisp.config import StudyConfig
from raydisp.errors import ConfigError
from raydisp.studyfile import differences, dump_study, load_study, parse_study

STUDIES = sorted(Path(__file__).parent.parent.glob("studies/*.yaml"))
SEARCH = STUDIES[[path.stem for path in STUDIES].index("weight_search")]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_study_files_load_and_fit_the_schema(path: Path) -> None:
    study = load_study(path)
    assert study.name == path.stem
    jsonschema.validate(study.model_dump(mode="json"), StudyConfig.model_json_schema())


def test_resolved_file_reads_back_equal(tmp_path: Path) -> None:
    study = load_study(SEARCH)
    copy = tmp_path / "study.yaml"
    copy.write_text(dump_study(study))
    assert load_study(copy) == study


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("2.0e-3", 2e-3), ("1E-4", 1e-4), ("3", 3.0), (".5", 0.5), ("1_0.5", 10.5)],
)
def test_numbers_as_people_write_them(text: str, value: float) -> None:
    assert load_study(SEARCH, [f"train.learning_rate={text}"]).train.learning_rate == value


def test_token_counts_may_be_integral_floats() -> None:
    study = load_study(SEARCH, ["train.budget_tokens=2e8"])
    assert study.train.budget_tokens == 200_000_000
    assert isinstance(study.train.budget_tokens, int)


def test_override_reaches_into_the_space() -> None:
    study = load_study(
        SEARCH, ["search.space.dispersion.weight.low=0.5", "search.space.train.beta1=[0.8, 0.9]"]
    )
    assert study.search.space["dispersion.weight"].low == 0.5
    assert study.search.space["train.beta1"] == [0.8, 0.9]


def line_of(key: str) -> int:
    lines = SEARCH.read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.strip().startswith(f"{key}:"))


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.learning_rate=abc", 'train.learning_rate = "abc" is not a number'),
        ("train.learning_rate=-1", "train.learning_rate = -1 is not above 0.0"),
        ("train.learning_rate=.nan", "train.learning_rate = NaN is not a finite number"),
        ("train.learning_rat=1", 'Did you mean "learning_rate"?'),
        ("trian.learning_rate=1", 'Did you mean "train"?'),
        ("train.budget_tokens=1.5", "train.budget_tokens = 1.5 is not a whole number"),
        ("train.budget_tokens=true", "train.budget_tokens = true is not a whole number"),
        ("train=5", "train = 5 is not a mapping of keys to values"),
        ("train.global_batch_tokens=1000", "the nearest that is: 896 or 1024"),
        ("train.micro_batch_tokens=100", "train.micro_batch_tokens = 100 is not a whole number of sequences"),
        ("resources.num_workers=3", "which resources.num_workers = 3 cannot share evenly"),
        ("resources.gpus_per_worker=1.5", "gpus_per_worker = 1.5: Ray gives parts of one GPU, or whole ones"),
        ("resources.placement_timeout_s=0", "resources.placement_timeout_s = 0 is not above 0"),
        ("resources.max_concurrent_trials=lots", 'is not a whole number or "auto"'),
        ("model.source=scrath", 'Did you mean "scratch"?'),
        ("model.hidden_size=130", "hidden_size = 130 is not a multiple of num_heads = 4"),
        ("model={}", "model.source is missing"),
        ("model={source: hub, id: gpt2, num_layers: 3}", '"num_layers" is not a key in model'),
        ("model={source: path, path: a, num_layers: 3}", '"num_layers" is not a key in model'),
        ("model={source: path, path: 3}", "model.path = 3 is not text"),
        ("model={source: path}", "model.path is missing"),
        ("name=a/b", 'name = "a/b" is not a name of letters'),
        ("dispersion.variant=angular", 'Did you mean "angular_spread"?'),
        ("dispersion.layers=lasst", 'Did you mean "last"?'),
        ("dispersion.layers=[7]", "dispersion.layers holds 7"),
        ("dispersion.layers=3", "dispersion.layers = 3 is not one of all, last"),
        (
            "dispersion.weight=-0.5",
            "dispersion.weight = -0.5 is not at least 0.0: below, it rewards what the loss is there to "
            "reduce; raise it, or say dispersion.allow_negative_weight: true if that is meant",
        ),
        ("dispersion.weight=.nan", "dispersion.weight = NaN is not a finite number"),
        ("evaluate.num_log_spaced=0", "evaluate.num_log_spaced = 0 is not at least 1"),
        ("evaluate.num_log_spaced=1001", "evaluate.num_log_spaced = 1001 is not at most 1000"),
        ("noisy_embedding.alpha=-1", "noisy_embedding.alpha = -1 is not at least 0.0"),
        ("noisy_embedding.alpha=.nan", "noisy_embedding.alpha = NaN is not a finite number"),
        ("noisy_embedding.alpha=.inf", "noisy_embedding.alpha = Infinity is not a finite number"),
        ("noisy_embedding.aplha=1", 'Did you mean "alpha"?'),
        (
            "active_forgetting.every_steps=200",
            "active_forgetting.every_steps = 200 is not below the 200 steps of the trial "
            "(train.budget_tokens = 204800 in steps of train.global_batch_tokens = 1024), so nothing would "
            "be forgotten; at most 199 is allowed: lower it, raise train.budget_tokens, or use null for no "
            "forgetting",
        ),
        ("active_forgetting.every_steps=0", "active_forgetting.every_steps = 0 is not at least 1"),
        ("active_forgetting.every_steps=1.5", "active_forgetting.every_steps = 1.5 is not a whole number"),
        ("active_forgetting.learning_rate=0", "active_forgetting.learning_rate = 0 is not above 0.0"),
        ("active_forgetting.learning_rate=.nan", "learning_rate = NaN is not a finite number"),
        (
            "search.space={active_forgetting.every_steps: [50, 200]}",
            'search.space["active_forgetting.every_steps"][1] = 200 is not allowed: ',
        ),
        (
            "search.space={dispersion.weight: {low: -1, high: 1}}",
            'search.space["dispersion.weight"].low = -1 is not allowed: dispersion.weight = -1.0 is not',
        ),
        (
            "search.space={dispersion.allow_negative_weight: [true, false]}",
            "dispersion.allow_negative_weight is the same in all trials of a study",
        ),
        ("dispersion.max_tokens=200", "is more than the data.context_length = 128 tokens"),
        ("evaluate.max_tokens=100", "is less than one sequence"),
        ("evaluate.task=[piqa]", '"task" is not a key in evaluate'),
        ("evaluate.tasks=[piqa, piqa]", "evaluate.tasks names piqa twice; keep one of them"),
        ("train.strategy=fsdp", "resources.num_workers = 1; use ddp, or at least 2 workers"),
        ("train.strategy=fdsp", 'Did you mean "fsdp"?'),
        ("train.on_nonfinite=skip", 'Did you mean "skip_step"?'),
        ("failures.max_failures=-1", "failures.max_failures = -1 is not at least 0"),
        ("failures.collective_timeout_s=0", "failures.collective_timeout_s = 0 is not above 0"),
        ("search.space={}", "is empty: there is nothing to search"),
        ("search.space.dispersion.wieght=[1]", 'Did you mean "dispersion.weight"?'),
        ("search.space.seed=[1, 2]", "seed is the same in all trials of a study"),
        ("search.space.dispersion.weight.low=0", "with log: true it must be above 0"),
        ("search.space.dispersion.weight.low=3", "low = 3 is not below high = 2.0"),
        ("search.space.dispersion.temperature.low=-1", "has no logarithm"),
        ("search.space.train.beta1={low: 0.5, high: 1.5}", ".high = 1.5 is not allowed"),
        ("search.space.dispersion.layers=[all, lasst]", '["dispersion.layers"][1] = "lasst"'),
        ("search.space.dispersion.layers=[all, all]", "names a value twice"),
        ("search.space.dispersion.layers=[{a: 1}]", "is not a number, a word, true, false, null"),
        (
            "search.space.dispersion.variant={low: 1, high: 2}",
            "is a range, but dispersion.variant is not a number",
        ),
        ("search.space.model.num_layers={low: 1.5, high: 3}", "low = 1.5 is not a whole number"),
        ("search.space.dispersion.weight=[0.1, high]", 'dispersion.weight = "high" is not a number'),
        ("search.sampler=tpa", 'Did you mean "tpe"?'),
        ("search.num_trials=0", "search.num_trials = 0 is not at least 1"),
        ("train.learning_rate.x=5", "is a single value, which has no keys"),
        ("nonsense", "expected dotted.key=value"),
        ("train.learning_rate=[1", "the value is not valid YAML"),
    ],
)
def test_each_mistake_has_its_sentence(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_study(SEARCH, [override])
    message = str(caught.value)
    assert sentence in message
    assert "\n" not in message, "one mistake, one sentence"
    assert "validation error" not in message, "pydantic's own words stay inside"


def test_a_mistake_names_its_line(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(SEARCH.read_text().replace("learning_rate: 2.0e-3", "learning_rate: fast"))
    with pytest.raises(ConfigError, match=f"^{bad}:{line_of('learning_rate')}: train.learning_rate"):
        load_study(bad)


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_study(SEARCH, ["train.learning_rate=abc", "model.num_layers=0"])
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [1, 2", ":1: not valid YAML"),
        ("name: x\n  seed: 1", ":2: not valid YAML"),
        ("name: x\nseed: 1\nseed: 2", ':3: the key "seed" stands twice, first on line 2'),
        ("- 1", "is a list; a study file is a mapping"),
        ("", "is empty; a study file is a mapping"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
    ],
)
def test_files_that_are_not_study_files(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_study(path)
    assert sentence in str(caught.value)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Did you mean .weight_search\.yaml"):
        load_study(SEARCH.with_name("weigth_search.yaml"))
    with pytest.raises(ConfigError, match="is a directory; give the path of a study file"):
        load_study(tmp_path)
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"name: \xff")
    with pytest.raises(ConfigError, match="byte 6 is not UTF-8"):
        load_study(binary)


def test_differences_tell_what_changes_results(tree: dict[str, Any]) -> None:
    def study(**changes: Any) -> StudyConfig:
        changed = yaml.safe_load(yaml.safe_dump(tree))
        for dotted, value in changes.items():
            section, key = dotted.split("__")
            changed.setdefault(section, {})[key] = value
        return StudyConfig.model_validate(changed)

    base = study()
    assert differences(base, study(search__num_trials=30)) == []
    assert differences(base, study(resources__num_workers=2)) == []
    assert differences(base, study(train__micro_batch_tokens=16)) == []
    assert differences(base, study(dispersion__allow_negative_weight=True)) == []
    assert differences(base, study(noisy_embedding__alpha=0.0, active_forgetting__every_steps=None)) == []
    assert differences(base, study(noisy_embedding__alpha=1.0)) == ["noisy_embedding.alpha (0.0 -> 1.0)"]
    assert differences(base, study(active_forgetting__every_steps=3)) == [
        "active_forgetting.every_steps (null -> 3)"
    ]
    assert differences(base, study(train__learning_rate=0.02)) == ["train.learning_rate (0.01 -> 0.02)"]
    assert differences(base, study(search__sampler="random")) == ['search.sampler ("tpe" -> "random")']


def test_identity_ignores_defaults_and_effort(study: StudyConfig) -> None:
    def changed(**parts: Any) -> StudyConfig:
        return study.model_copy(update=parts)

    spelt_out = StudyConfig.model_validate(json.loads(study.model_dump_json()))
    assert spelt_out.trial.sha256 == study.trial.sha256
    effort = study.train.model_copy(update={"micro_batch_tokens": 16})
    assert changed(train=effort).trial.sha256 == study.trial.sha256
    result = study.train.model_copy(update={"beta2": 0.99})
    assert changed(train=result).trial.sha256 != study.trial.sha256
    assert changed(seed=4).trial.sha256 != study.trial.sha256


def test_weights_below_0_need_a_word(tree: dict[str, Any]) -> None:
    schema = StudyConfig.model_json_schema()
    tree["dispersion"]["weight"] = -0.5
    with pytest.raises(jsonschema.ValidationError, match="less than the minimum of 0"):
        jsonschema.validate(tree, schema)
    tree["dispersion"]["allow_negative_weight"] = True
    jsonschema.validate(tree, schema)
    tree["search"]["space"] = {"dispersion.weight": {"low": -1.0, "high": 1.0}}
    study = parse_study(yaml.safe_dump(tree), "x.yaml")
    assert study.dispersion.weight == -0.5
    assert study.search.space["dispersion.weight"].low == -1.0
    assert study.trial.identity()["dispersion"] == {"weight": -0.5}


def test_variant_names_are_those_of_the_losses() -> None:
    from typing import get_args

    from raydisp.config.train import Variant
    from raydisp.losses import VARIANTS

    assert set(get_args(Variant)) == set(VARIANTS)
