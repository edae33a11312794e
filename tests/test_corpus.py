"""Documents, their splits, and one clear sentence for every mistake."""

from __future__ import annotations

import gzip
import json
import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydisp.config.data import Files, HubData, PythonDocs
from raydisp.data import corpus, python_docs
from raydisp.errors import DataError


def words(n: int) -> list[str]:
    return [f"document {i} speaks of the number {i * i} and of nothing else" for i in range(n)]


def files(*paths: object, **fields: object) -> Files:
    return Files.model_validate({"source": "files", "paths": [str(path) for path in paths], **fields})


def hub_data(path: object, **fields: object) -> HubData:
    return HubData.model_validate({"source": "hub", "path": str(path), **fields})


def texts(data: corpus.DataConfig) -> list[str]:
    return [text for _, text in corpus.documents(data)]


def write_lines(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


GOLDEN_SPLITS = [
    "test",
    "validation",
    "train",
    "test",
    "validation",
    "test",
    "train",
    "test",
    "validation",
    "validation",
    "validation",
    "validation",
]


# --- splits -------------------------------------------------------------------------------------------


def test_a_split_is_a_frozen_function_of_the_text() -> None:
    # Written down once: a changed hash would silently move documents of old studies between splits.
    found = [corpus.split_of(text, 0.2, 0.2) for text in words(12)]
    assert found == GOLDEN_SPLITS


def test_fractions_are_kept() -> None:
    found = [corpus.split_of(text, 0.05, 0.1) for text in words(10_000)]
    # Binomial: standard deviations 22 and 30.
    assert found.count("validation") == pytest.approx(500, abs=100)
    assert found.count("test") == pytest.approx(1000, abs=130)


def test_the_test_split_does_not_depend_on_the_validation_fraction() -> None:
    narrow = [corpus.split_of(text, 0.01, 0.1) == "test" for text in words(1000)]
    wide = [corpus.split_of(text, 0.4, 0.1) == "test" for text in words(1000)]
    assert narrow == wide


# --- python_docs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def docs_by_split() -> list[tuple[str, str, str]]:
    return list(corpus.split_documents(PythonDocs(source="python_docs")))


def test_python_docs_are_topics_and_docstrings(docs_by_split: list[tuple[str, str, str]]) -> None:
    by_name = {name: text for _, name, text in docs_by_split}
    assert len(by_name) == len(docs_by_split)
    assert "compound statements" in by_name["topic/compound"].lower()
    assert json.JSONDecoder.__doc__ is not None
    assert json.JSONDecoder.__doc__.split("\n")[0].strip() in by_name["docstrings/json/decoder.py"]
    assert not [name for name in by_name if "/test/" in name or "/tests/" in name or "site-packages" in name]


def test_python_docs_are_large_enough_in_every_split(docs_by_split: list[tuple[str, str, str]]) -> None:
    sizes = {split: sum(len(text) for s, _, text in docs_by_split if s == split) for split in corpus.SPLITS}
    assert sizes["train"] > 1_500_000
    # The default evaluation during training takes 8,192 tokens of about 4 characters.
    assert min(sizes["validation"], sizes["test"]) > 4 * 8192


def test_python_docs_of_a_library_of_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b.py").write_text(
        '"""Module b."""\n\nclass C:\n    """Class C."""\n\n    def f(self):\n        """Shared."""\n'
        'if True:\n    async def g():\n        """Under a condition."""\n\nraise SystemExit("imported")\n'
    )
    (tmp_path / "a.py").write_text('def f():\n    """Shared."""\n\ndef g():\n    """Shared."""\n')
    (tmp_path / "broken.py").write_text("def {{ template }}")
    (tmp_path / "half.py").write_text('"""Half a pair: \\ud800."""\n')
    for skipped in ("test", "encodings", "site-packages"):
        (tmp_path / skipped).mkdir()
        (tmp_path / skipped / "x.py").write_text('"""Not prose of the library."""\n')
    monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda name: str(tmp_path))
    found = dict(corpus.documents(PythonDocs(source="python_docs")))
    for path in tmp_path.glob("*.py"):
        path.unlink()
    with pytest.raises(DataError, match="needs the sources of the standard library"):
        corpus.describe(PythonDocs(source="python_docs"))
    assert {name: text for name, text in found.items() if not name.startswith("topic/")} == {
        "docstrings/a.py": "Shared.",
        "docstrings/b.py": "Module b.\n\nClass C.\n\nUnder a condition.",
    }


def test_python_docs_are_parsed_once_until_a_source_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, cache = tmp_path / "library", tmp_path / "cache"
    library.mkdir()
    cache.mkdir()
    source = library / "a.py"
    source.write_text('"""The first."""\n')
    monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda name: str(library))
    parsed: list[Path] = []
    parse = python_docs._parse
    monkeypatch.setattr(python_docs, "_parse", lambda root: parsed.append(root) or parse(root))

    def another_process() -> tuple[tuple[str, str], ...]:
        monkeypatch.setattr(python_docs, "_known", {})
        python_docs.recall(str(cache))
        found = python_docs.documents()
        python_docs.keep(str(cache))
        return found

    first = another_process()
    assert first[-1] == ("docstrings/a.py", "The first.")
    assert another_process() == first
    assert len(parsed) == 1
    source.write_text('"""The second."""\n')
    assert another_process()[-1] == ("docstrings/a.py", "The second.")
    assert len(parsed) == 2
    for file in cache.iterdir():
        file.write_text("[[1")  # damaged
    assert another_process()[-1] == ("docstrings/a.py", "The second.")
    assert len(parsed) == 3


# --- files --------------------------------------------------------------------------------------------


def test_every_kind_of_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain text, ünïcode\r\nkept as it is\n")
    write_lines(tmp_path / "b.jsonl", [{"text": "line one", "n": 1}, {"text": "line two"}])
    write_lines(tmp_path / "c.json", [{"text": "named json"}])
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write('{"text": "packed"}\n\n{"text": "   "}\n')
    pq.write_table(pa.table({"id": [1, 2], "text": ["row one", "row two"]}), tmp_path / "e.parquet")
    assert texts(files(tmp_path / "*")) == [
        "plain text, ünïcode\r\nkept as it is\n",
        "line one",
        "line two",
        "named json",
        "packed",
        "row one",
        "row two",
    ]


def test_dictionary_and_large_strings_of_parquet_are_text(tmp_path: Path) -> None:
    table = pa.table(
        {
            "large": pa.array(["one", "two"], pa.large_string()),
            "coded": pa.array(["red", "red"]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")
    assert texts(files(tmp_path / "t.parquet", text_field="large")) == ["one", "two"]
    assert texts(files(tmp_path / "t.parquet", text_field="coded")) == ["red", "red"]


def test_globs_home_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "z.txt").write_text("deep")
    (tmp_path / "y.txt").write_text("top")
    (tmp_path / "odd[1].txt").write_text("brackets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert texts(files("**/*.txt")) == ["deep", "brackets", "top"]
    assert texts(files("~/y.txt")) == ["top"]
    assert texts(files("odd[1].txt")) == ["brackets"], "a name that exists is not a pattern"
    assert texts(files("y.txt", "*.txt")) == ["top", "brackets"], "a file named twice is read once"


def test_the_content_hash_follows_content_and_not_names(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("same")
    first = corpus.open_corpus(files(tmp_path / "one" / "a.txt")).sha256
    assert corpus.open_corpus(files(tmp_path / "two" / "a.txt")).sha256 == first
    (tmp_path / "two" / "a.txt").write_text("other")
    assert corpus.open_corpus(files(tmp_path / "two" / "a.txt")).sha256 != first


def test_describe_counts_a_small_corpus(tmp_path: Path) -> None:
    write_lines(tmp_path / "t.jsonl", [{"text": text} for text in words(300)])
    data = files(tmp_path / "t.jsonl", validation_frac=0.1, test_frac=0.1, context_length=32)
    summary = corpus.describe(data)
    assert summary.num_documents == 300
    assert summary.num_bytes == sum(len(text) for text in words(300))
    assert summary.splits is not None
    for split, counted in summary.splits.items():
        mine = [text for text in words(300) if corpus.split_of(text, 0.1, 0.1) == split]
        assert counted == corpus.SplitSummary(len(mine), sum(map(len, mine)))


def test_describe_samples_a_large_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "COUNTED_BYTES", 100)
    path = write_lines(tmp_path / "t.jsonl", [{"text": text} for text in words(50)])
    summary = corpus.describe(files(path))
    assert summary.num_documents is None
    assert summary.splits is None
    assert summary.num_bytes == path.stat().st_size
    with pytest.raises(DataError, match="no field"):
        corpus.describe(files(path, text_field="body"))


@pytest.mark.parametrize(
    ("name", "content", "fields", "expected"),
    [
        ("a.txt", b"fine \xff not", {}, ["a.txt", "UTF-8", "0xff", "offset 5"]),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xe9"}\n', {}, ["a.jsonl", "0xe9", "offset 25"]),
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', {}, ["line 2", "not JSON"]),
        ("a.jsonl", b'["text"]\n', {}, ["line 1", "array", "one object a line"]),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', {"text_field": "bodi"}, ["bodi", "body, id", 'mean "body"']),
        ("a.jsonl", b'{"text": 7}\n', {}, ["line 1", "number", "not a string"]),
        ("a.jsonl", b'{"text": null}\n', {}, ["line 1", "null"]),
        ("a.jsonl", b'{"text": "\\ud800"}\n', {}, ["line 1", "surrogate"]),
        ("a.jsonl.gz", b"not gzip", {}, ["a.jsonl.gz", "cannot be read"]),
        ("a.parquet", b"not parquet", {}, ["a.parquet", "Parquet"]),
        ("a.txt", b" \n\t", {}, ["holds no text"]),
    ],
)  # fmt: skip
def test_a_bad_file_is_named_with_its_fault(
    tmp_path: Path, name: str, content: bytes, fields: dict[str, str], expected: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as raised:
        corpus.describe(files(tmp_path / name, **fields))
    for part in expected:
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"body": ["x"]}, ["no column", '"text"', "body"]),
        ({"text": [1, 2]}, ["int64", "not strings"]),
        ({"text": [["x"]]}, ["list", "not strings"]),
        ({"text": ["x", None]}, ["row 2", "null"]),
    ],
)
def test_a_bad_column_is_named(tmp_path: Path, table: dict[str, list[object]], expected: list[str]) -> None:
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    with pytest.raises(DataError) as raised:
        corpus.describe(files(tmp_path / "t.parquet"))
    for part in expected:
        assert part in str(raised.value)


def test_bytes_that_are_no_text_in_a_string_column(tmp_path: Path) -> None:
    broken = pa.array([b"ok", b"\xff\xfe"]).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": broken}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="not UTF-8 text"):
        corpus.describe(files(tmp_path / "t.parquet"))


def test_paths_that_name_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r'data\.paths\[1\] = ".*nothing\*\.txt" matches no file'):
        corpus.describe(files(tmp_path / "a.txt", tmp_path / "nothing*.txt"))
    with pytest.raises(DataError, match="does not exist"):
        corpus.describe(files(tmp_path / "absent.txt"))
    with pytest.raises(DataError, match=r"is a folder; .*\*\*/\*\.txt"):
        corpus.describe(files(tmp_path))


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("x")
    # The tests may run as root, whom no permission stops.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(DataError, match=r"a\.txt cannot be read by this user"):
        corpus.describe(files(tmp_path / "a.txt"))


def test_an_empty_split_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "only.txt").write_text("one long text " * 1000)
    with pytest.raises(DataError) as raised:
        corpus.describe(files(tmp_path / "only.txt"))
    assert "leaves none of 1 document for the validation split" in str(raised.value)
    assert "cut a long one into several files" in str(raised.value)


def test_a_corpus_shorter_than_a_block(tmp_path: Path) -> None:
    write_lines(tmp_path / "t.jsonl", [{"text": text} for text in words(100)])
    with pytest.raises(DataError, match=r"the (validation|test) split has \d+ bytes .*context_length = 4096"):
        corpus.describe(files(tmp_path / "t.jsonl", context_length=4096))


# --- hub ----------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")
    folder = tmp_path / "little"
    folder.mkdir()
    write_lines(folder / "train.jsonl", [{"text": text} for text in words(400)])
    write_lines(folder / "validation.jsonl", [{"text": f"kept apart {text}"} for text in words(20)])
    return folder


def test_a_local_dataset_keeps_its_splits(dataset: Path) -> None:
    data = hub_data(dataset, validation_split="validation", test_frac=0.1, context_length=16)
    found: dict[str, list[str]] = {split: [] for split in corpus.SPLITS}
    for split, _, text in corpus.split_documents(data):
        found[split].append(text)
    assert found["validation"] == [f"kept apart {text}" for text in words(20)]
    assert found["test"] == [text for text in words(400) if corpus.split_of(text, 0.0, 0.1) == "test"]
    assert found["train"] == [text for text in words(400) if corpus.split_of(text, 0.0, 0.1) == "train"]
    summary = corpus.describe(data)
    assert summary.num_documents == 420
    assert corpus.resolve_data_revision(data) is None
    assert corpus.open_corpus(data).revision is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"text_field": "txet"}, ["no column", "txet", "text"]),
        ({"train_split": "trian"}, ["data.train_split", "trian", 'mean "train"']),
        ({"test_split": "exam"}, ["data.test_split", "exam", "train, validation"]),
        ({"name": "nonesuch"}, ["data.name"]),
    ],
)
def test_mistakes_about_a_dataset(dataset: Path, fields: dict[str, str], expected: list[str]) -> None:
    with pytest.raises(DataError) as raised:
        corpus.describe(hub_data(dataset, **fields))
    for part in expected:
        assert part in str(raised.value)


def test_a_dataset_that_is_nowhere_is_told_within_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    # A port of this machine that nobody listens on: as without a network, and the same with one.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(DataError, match=r"no-one/nothing.* not in the local cache and the hub"):
        corpus.describe(hub_data("no-one/nothing"))
    assert time.monotonic() - started < 10


def test_a_cached_dataset_is_read_without_a_network(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    sha = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "hub" / "datasets--some-one--little"
    (folder / "snapshots").mkdir(parents=True)
    dataset.rename(folder / "snapshots" / sha)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(sha)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    data = hub_data("some-one/little")
    assert "0123456789ab" in corpus.describe(data).source
    assert corpus.resolve_data_revision(data) == sha
    assert texts(data) == words(400)
    with pytest.raises(DataError, match=r"at revision 'v2' is not in the local cache"):
        corpus.describe(hub_data("some-one/little", revision="v2"))
