"""What docs/results says is what the rows beside it say, and belongs to the study files as they are."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from raydisp import results
from raydisp.studyfile import differences, load_study, parse_study

ROOT = Path(__file__).resolve().parent.parent
RECORDED = ROOT / "docs" / "results"
STUDIES = sorted(path.parent for path in RECORDED.glob("*/study.yaml"))


@pytest.fixture(scope="module")
def record() -> ModuleType:
    spec = importlib.util.spec_from_file_location("record", RECORDED / "record.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["record"] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_says_what_the_rows_say(record: ModuleType) -> None:
    page = (RECORDED / "README.md").read_text()
    assert {match["name"] for match in record.BLOCK.finditer(page)} == set(record.BLOCKS)
    assert record.render(page) == page, "run python docs/results/record.py"
    spoilt = re.sub(r"\| \*helps\*", "| *hurts*", page)
    assert spoilt != page
    assert record.render(spoilt) == page


def test_there_are_recorded_studies() -> None:
    assert len(STUDIES) >= 3


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_a_recorded_study_is_that_of_its_file(folder: Path) -> None:
    """So that its command goes on with the rows that are here."""
    recorded = parse_study((folder / "study.yaml").read_text(), "study.yaml")
    stem = re.sub(r"_\d$", "", folder.name)
    overrides = [f"name={recorded.name}", f"seed={recorded.seed}"]
    assert differences(recorded, load_study(ROOT / "studies" / f"{stem}.yaml", overrides)) == []


@pytest.mark.parametrize("folder", STUDIES, ids=lambda folder: folder.name)
def test_recorded_rows_are_whole_and_name_no_place(folder: Path) -> None:
    tables = results.read_tables(str(folder))
    ended = {row["trial"] for row in tables.trials.to_pylist() if row["status"] != "interrupted"}
    assert ended
    for name in ("steps", "evals", "layers"):
        recorded = set(getattr(tables, name)["trial"].to_pylist())
        assert ended <= recorded
    text = str(tables.trials.to_pylist())
    assert not re.search(r"/(home|root|tmp|work|Users)/", text)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 5e6
