"""The generated references: complete, true to what the code does, and committed as the code has them now."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pytest

from raydisp import results, verdict
from raydisp.config import StudyConfig, TrialConfig
from raydisp.measure import tables as measure_tables
from raydisp.reference import pages as reference
from raydisp.reference.fields import allowed, groups
from raydisp.results import columns
from raydisp.search.space import searchable_fields
from raydisp.studyfile import parse_study
from raydisp.tasks import effects as task_effects

DOCS = Path(__file__).parent.parent / "docs"
ENTRIES = [entry for group in groups() for entry in group.entries]
OF_TRIAL = [entry for entry in ENTRIES if entry.identity is not None]

TABLES = {
    "trials": (columns.TRIALS, results.base_schema("trials")),
    "steps": (columns.STEPS, results.STEP_SCHEMA),
    "evals": (columns.EVALS, results.EVAL_SCHEMA),
    "layers": (columns.LAYERS, results.LAYER_SCHEMA),
    "items": (columns.ITEMS, results.ITEM_SCHEMA),
    "benchmarks": (task_effects.BENCHMARK_COLUMNS, task_effects.BENCHMARK_SCHEMA),
    "verdicts": (verdict.VERDICT_COLUMNS, verdict.VERDICT_SCHEMA),
    "effects": (verdict.EFFECT_COLUMNS, verdict.EFFECT_SCHEMA),
    "models": (measure_tables.MODEL_COLUMNS, measure_tables.MODEL_SCHEMA),
    "condensation": (measure_tables.CONDENSATION_COLUMNS, measure_tables.CONDENSATION_SCHEMA),
}

MODELS: list[dict[str, Any]] = [
    {"source": "scratch"},
    {"source": "hub", "id": "gpt2"},
    {"source": "path", "path": "m"},
    {"source": "gguf", "path": "m.gguf"},
]
DATA: list[dict[str, Any]] = [
    {"source": "python_docs"},
    {"source": "files", "paths": ["x.txt"]},
    {"source": "hub", "path": "x"},
]


def trials() -> list[TrialConfig]:
    """One of each kind of model and of data."""
    train = {"budget_tokens": 1280, "global_batch_tokens": 128, "learning_rate": 0.01}
    kinds = [(model, DATA[0]) for model in MODELS] + [(MODELS[0], data) for data in DATA[1:]]
    return [
        TrialConfig.model_validate({"model": model, "data": data, "train": train}) for model, data in kinds
    ]


def test_pages_are_as_the_code_has_them() -> None:
    found = reference.pages(DOCS)
    assert {page.name for page in found} == {"results.md", "study-file.md"}
    for page in found:
        same = reference.fill(page.read_text()) == page.read_text()
        assert same, f"{page} is not what the code says now; run {reference.COMMAND} and commit"


def test_every_part_has_a_place() -> None:
    text = "".join(page.read_text() for page in reference.pages(DOCS))
    assert [name for name in reference.PARTS if f"<!-- generated: {name} -->" not in text] == []


# --- columns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(TABLES))
def test_every_column_has_a_meaning(name: str) -> None:
    described, schema = TABLES[name]
    assert {key: column.type for key, column in described.items()} == {
        field.name: field.type for field in schema
    }
    assert [key for key, column in described.items() if not column.meaning] == []
    units = {"_s": "s", "_bytes": "bytes", "_tokens": "tokens"}
    for key, column in described.items():
        for ending, unit in units.items():
            if key.endswith(ending) and pa.types.is_primitive(column.type) and not key.endswith("_per_s"):
                assert column.unit == unit, f"{key} is in {column.unit or 'no unit'}"


# --- fields -------------------------------------------------------------------------------------------------


def test_every_field_has_a_meaning_and_a_range() -> None:
    assert [entry.name for entry in ENTRIES if not entry.meaning or not entry.allowed] == []
    assert [group.title for group in groups() if not group.text] == []


def test_no_field_is_missing() -> None:
    """What the resolved file of a study says, the reference has."""
    text = """
        name: x
        model: {source: scratch}
        data: {source: python_docs}
        train: {budget_tokens: 102400, global_batch_tokens: 1024, learning_rate: 0.002}
        search:
          num_trials: 4
          space: {dispersion.weight: {low: 0.1, high: 1.0}, dispersion.layers: {choices: [all, last]}}
          scheduler: {asha: {grace_tokens: 51200}}
          stop_when: {no_improvement_trials: 3}
        evaluate: {every_tokens: 51200}
        confirm: {smallest_effect: 0.01}
        trackers: [{mlflow: {experiment: x}}]
    """
    found = {
        name.replace("search.space.dispersion.weight", "search.space.FIELD").replace(
            "search.space.dispersion.layers", "search.space.FIELD"
        )
        for name in leaves(parse_study(text, "x.yaml").model_dump(mode="json"), "")
    }
    assert found - {entry.name for entry in ENTRIES} == set()


def leaves(tree: Any, at: str) -> list[str]:
    if isinstance(tree, list):
        return [name for item in tree for name in leaves(item, at)]
    if not isinstance(tree, dict) or not tree:
        return [at]
    return [name for key, value in tree.items() for name in leaves(value, f"{at}.{key}" if at else str(key))]


def test_the_defaults_are_those_of_the_classes() -> None:
    by_name = {entry.name: entry.default for entry in ENTRIES}
    assert by_name["train.budget_tokens"] is None
    assert by_name["train.tf32"] == "false"
    assert by_name["active_forgetting.learning_rate"] == "5e-05"
    assert by_name["search.objective"] == "{metric: val_loss, mode: min}"
    assert by_name["trackers"] == "[]"


def test_what_can_be_searched_is_what_a_search_takes() -> None:
    told = {entry.name for entry in OF_TRIAL if entry.searched}
    rest = {"name": "x", "search": {"num_trials": 1}}
    studies = [StudyConfig.model_validate({**trial.model_dump(), **rest}) for trial in trials()]
    assert told == {name for study in studies for name in searchable_fields(study)}


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_what_is_called_identity_changes_the_identity() -> None:
    """Each field is set to something else, whatever its rules, and the trial hashed anew."""
    found: dict[str, bool] = {}
    for trial in trials():
        for part in TrialConfig.model_fields:
            section = getattr(trial, part)
            if part == "seed":
                found[part] = trial.model_copy(update={part: 77}).sha256 != trial.sha256
                continue
            for name in type(section).model_fields:
                changed = section.model_copy(update={name: "something else"})
                other = trial.model_copy(update={part: changed})
                found[f"{part}.{name}"] = other.sha256 != trial.sha256
    inner = {entry.name: entry.identity for entry in OF_TRIAL if entry.name.count(".") > 1}
    assert {name.rpartition(".")[0] for name in inner} == {"evaluate.tasks", "distillation.teacher"}
    assert inner == {name: found[name.rpartition(".")[0]] for name in inner}
    assert found == {entry.name: entry.identity for entry in OF_TRIAL if entry.name not in inner}


def test_editors_are_told_the_bounds_of_whole_numbers() -> None:
    schema = StudyConfig.model_json_schema()
    assert schema["$defs"]["TrainConfig"]["properties"]["budget_tokens"]["minimum"] == 1
    assert schema["properties"]["seed"]["maximum"] == 2**32 - 1
    tree = {**trials()[0].model_dump(mode="json"), "name": "x", "search": {"num_trials": 1}}
    jsonschema.validate(tree, schema)
    tree["train"]["budget_tokens"] = 0
    with pytest.raises(jsonschema.ValidationError, match="0 is less than the minimum of 1"):
        jsonschema.validate(tree, schema)


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "integer", "minimum": 1, "maximum": 10**15}, "whole number (1 to 10^15)"),
        ({"type": "integer", "minimum": 300, "maximum": 1_000_000}, "whole number (300 to 1,000,000)"),
        ({"type": "number", "exclusiveMinimum": 0.0, "exclusiveMaximum": 0.5}, "number (above 0, below 0.5)"),
        ({"anyOf": [{"type": "number"}, {"const": "auto"}, {"type": "null"}]}, "number, `auto` or `null`"),
        ({"anyOf": [{"type": "integer"}, {"type": "number"}]}, "number"),
        ({"type": ["number", "boolean"]}, "number, `true` or `false`"),
        (
            {"type": "object", "additionalProperties": {"type": "integer"}},
            "mapping of names to whole numbers",
        ),
        (
            {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2},
            "list of length 2 of whole numbers",
        ),
        ({"enum": ["ddp", "fsdp"]}, "`ddp` or `fsdp`"),
        ({"$ref": "#/$defs/Asha"}, "[asha](#x)"),
    ],
)
def test_what_a_field_may_be_in_words(schema: dict[str, Any], words: str) -> None:
    assert allowed(schema, {"Asha": "[asha](#x)"}) == words


# --- the command --------------------------------------------------------------------------------------------


def test_the_command_fills_the_places_of_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "folder" / "page.md"
    page.parent.mkdir()
    page.write_text("# Mine\n\n<!-- generated: steps -->\nold\n<!-- end -->\n\nmine\n")
    assert reference.main([str(tmp_path)]) == 0
    text = page.read_text()
    assert text.startswith("# Mine\n\n<!-- generated: steps -->\n\n| column | type | unit | meaning |")
    assert text.endswith("|\n\n<!-- end -->\n\nmine\n")
    assert "| `elapsed_s` | `float64` | s |" in text
    assert "old" not in text
    assert reference.main([str(tmp_path)]) == 0
    assert page.read_text() == text
    assert [line.split(": ")[-1] for line in capsys.readouterr().out.splitlines()] == ["written", "as it was"]


def test_mistakes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reference.main([str(tmp_path)]) == 2
    assert "holds no page with a generated part" in capsys.readouterr().err
    (tmp_path / "page.md").write_text("<!-- generated: step -->\n<!-- end -->\n")
    assert reference.main([str(tmp_path)]) == 2
    assert 'page.md: "step" is not a generated part; there are fields' in capsys.readouterr().err
