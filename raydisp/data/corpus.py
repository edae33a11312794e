"""Raw documents: where they come from, which split each belongs to, and what is wrong with them.

A document is a text with an identifier. Its split is decided by a hash of the text alone, so it depends
neither on the order nor on the number of the documents, and equal documents never sit on both sides.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, cast

from raydisp import hub
from raydisp.config.data import DataConfig, Files, HubData, PythonDocs
from raydisp.data import python_docs
from raydisp.errors import DataError, suggest

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

COUNTED_BYTES = 64 * 2**20
"""Up to this size `describe` reads every document; above it, it samples the first of each file."""

_LISTED_FILES = 100


@dataclass(frozen=True)
class SplitSummary:
    """num_bytes: of the UTF-8 text."""

    num_documents: int
    num_bytes: int


@dataclass(frozen=True)
class CorpusSummary:
    """What a corpus holds, as far as it could be told cheaply.

    Attributes:
        source: python_docs, files or hub, in words, with the pinned commit of a hub dataset.
        num_documents: None where counting means reading everything.
        num_bytes: of the UTF-8 text, or of the files where `splits` is None; None where it is not known.
        splits: per split, None where counting means reading everything.
    """

    source: str
    num_documents: int | None
    num_bytes: int | None
    splits: dict[Split, SplitSummary] | None


@dataclass(frozen=True)
class Corpus:
    """A corpus that was found and pinned, before its documents are read.

    Attributes:
        data: where from.
        sha256: of the content: documents, file contents, or path, name and commit of a hub dataset.
        files: (path, bytes) of the source files, the first 100.
        num_files: of all.
        revision: commit of a hub dataset, None otherwise.
        python: version whose texts python_docs are, None otherwise.
    """

    data: PythonDocs | Files | HubData
    sha256: str
    files: tuple[tuple[str, int], ...]
    num_files: int
    revision: str | None
    python: str | None


def split_of(text: str, validation_frac: float, test_frac: float) -> Split:
    """The split of a document, by a hash of its text: test, validation or train, in this order on [0, 1)."""
    # 53 bits: exactly a float in [0, 1).
    point = (int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 11) / 2**53
    if point < test_frac:
        return "test"
    return "validation" if point < test_frac + validation_frac else "train"


def documents(data: DataConfig) -> Iterator[tuple[str, str]]:
    """(identifier, text) of every document of all splits, in a fixed order, white space alone left out."""
    for _, identifier, text in split_documents(data):
        yield identifier, text


def split_documents(data: DataConfig, revision: str | None = None) -> Iterator[tuple[Split, str, str]]:
    """(split, identifier, text) of every document, in a fixed order, one at a time.

    Args:
        data: the section `data` of a study file.
        revision: commit of a hub dataset as found by `open_corpus`; None resolves it anew.
    Raises:
        DataError: a document cannot be read; earlier ones have been yielded by then.
    """
    if isinstance(data, HubData):
        yield from _hub_documents(data, revision)
        return
    pairs = python_docs.documents() if isinstance(data, PythonDocs) else _file_documents(data)
    for identifier, text in pairs:
        yield split_of(text, data.validation_frac, data.test_frac), identifier, text


def open_corpus(data: DataConfig) -> Corpus:
    """Find the corpus and the hash of its content; files are read once, hub data are only pinned.

    Raises:
        DataError: it is not there, or not readable.
    """
    if isinstance(data, PythonDocs):
        pairs = python_docs.documents()
        sizes = tuple((identifier, len(text.encode())) for identifier, text in pairs)
        return Corpus(
            data, _sha256_of(pairs), sizes[:_LISTED_FILES], len(sizes), None, platform.python_version()
        )
    if isinstance(data, Files):
        paths = _matching_files(data)
        digest = hashlib.sha256()
        for path in paths:
            # The names are left out: the same texts elsewhere are the same corpus.
            digest.update(_kind(path).encode())
            digest.update(_file_digest(path))
        sizes = tuple((path, os.path.getsize(path)) for path in paths[:_LISTED_FILES])
        return Corpus(data, digest.hexdigest(), sizes, len(paths), None, None)
    if _local_folder(data) is not None:
        texts = ((split, text) for split, _, text in split_documents(data))
        return Corpus(data, _sha256_of(texts), (), 0, None, None)
    sha = resolve_data_revision(data)
    identity = f"hub:{data.path}:{data.name}:{sha}"
    return Corpus(data, hashlib.sha256(identity.encode()).hexdigest(), (), 0, sha, None)


def resolve_data_revision(data: DataConfig) -> str | None:
    """The commit of a dataset on the hub; None for everything that lies on this machine.

    Raises:
        DataError: no such dataset or revision, or no network and not in the cache; within seconds.
    """
    if not isinstance(data, HubData) or _local_folder(data) is not None:
        return None
    return _commit(data).sha


def describe(data: DataConfig) -> CorpusSummary:
    """What the corpus holds, with every mistake that can be told without training or downloading.

    A corpus of up to 64 MiB is read completely. Of a larger one each file is opened and its first document
    read. Of a hub dataset only the description is fetched.

    Raises:
        DataError: not found, not readable, empty, or a split that is empty or surely shorter than one block.
    """
    if isinstance(data, HubData) and _local_folder(data) is None:
        return _describe_hub(data)
    if isinstance(data, Files):
        paths = _matching_files(data)
        num_bytes = sum(os.path.getsize(path) for path in paths)
        source = f"{len(paths)} file{'s' if len(paths) != 1 else ''} ({', '.join(data.paths)})"
        if num_bytes > COUNTED_BYTES:
            for path in paths:
                next(_read_file(path, data.text_field), None)
            return CorpusSummary(source, None, num_bytes, None)
    elif isinstance(data, PythonDocs):
        source = f"documentation of CPython {platform.python_version()}"
    else:
        source = f"local dataset {data.path}"
    counts = {split: [0, 0] for split in SPLITS}
    for split, _, text in split_documents(data):
        counts[split][0] += 1
        counts[split][1] += len(text.encode())
    splits = {split: SplitSummary(*counts[split]) for split in SPLITS}
    check_splits(data, splits)
    return CorpusSummary(
        source,
        sum(split.num_documents for split in splits.values()),
        sum(split.num_bytes for split in splits.values()),
        splits,
    )


def check_splits(data: DataConfig, splits: dict[Split, SplitSummary]) -> None:
    """Refuse an empty corpus, an empty split, and one with fewer bytes than a block has tokens.

    Raises:
        DataError: with the split, what it holds and what it needs.
    """
    total = sum(split.num_documents for split in splits.values())
    if total == 0:
        raise DataError(
            f"{_where(data)} holds no text: every document is empty or white space; name data with text in it"
        )
    for name, split in splits.items():
        if split.num_documents == 0:
            raise DataError(_empty_split(data, name, total))
        # A tokenizer gives at most one token a byte, plus end-of-text (and a leading space) a document.
        if split.num_bytes + 2 * split.num_documents < data.context_length:
            raise DataError(
                f"{_where(data)}: the {name} split has {split.num_bytes} bytes of text in "
                f"{split.num_documents} document{'s' if split.num_documents != 1 else ''}, too short for one "
                f"block of data.context_length = {data.context_length} tokens; add text, raise its "
                "fraction or lower data.context_length"
            )


def _empty_split(data: DataConfig, name: str, total: int) -> str:
    found = f"{total} document{'s' if total != 1 else ''}"
    if isinstance(data, HubData) and (name == "train" or getattr(data, f"{name}_split")):
        named = getattr(data, f"{name}_split")
        return f'data.{name}_split = "{named}" of {data.path} holds no text; name a split with text in it'
    if name == "train":
        return f"{_where(data)}: none of {found} falls into the train split; add documents"
    advice = f"add documents or raise data.{name}_frac"
    if isinstance(data, Files):
        advice += " (a text file is one document: cut a long one into several files, or into JSON lines)"
    elif isinstance(data, HubData):
        advice += f", or name a split of the dataset in data.{name}_split"
    return (
        f"{_where(data)}: data.{name}_frac = {getattr(data, f'{name}_frac')} leaves none of {found} for the "
        f"{name} split; {advice}"
    )


def _where(data: DataConfig) -> str:
    if isinstance(data, Files):
        return f"data.paths = {json.dumps(data.paths)}"
    return f'data.path = "{data.path}"' if isinstance(data, HubData) else 'data.source = "python_docs"'


def _sha256_of(pairs: Iterable[tuple[str, str]]) -> str:
    digest = hashlib.sha256()
    for pair in pairs:
        for part in pair:
            encoded = part.encode()
            # The length first, so that no two lists of texts run together to the same bytes.
            digest.update(len(encoded).to_bytes(8, "big"))
            digest.update(encoded)
    return digest.hexdigest()


# --- files --------------------------------------------------------------------------------------------


def _matching_files(data: Files) -> list[str]:
    found: dict[str, None] = {}
    for index, pattern in enumerate(data.paths):
        where = f'data.paths[{index}] = "{pattern}"'
        expanded = os.path.expanduser(pattern)
        if os.path.isdir(expanded):
            raise DataError(
                f'{where} is a folder; name the files in it, for example "{pattern.rstrip("/")}/**/*.txt"'
            )
        matches = [expanded] if os.path.exists(expanded) else glob.glob(expanded, recursive=True)
        files = sorted(path for path in matches if os.path.isfile(path))
        if not files:
            what = "matches no file" if glob.has_magic(expanded) else "does not exist"
            relative = "" if os.path.isabs(expanded) else f" (relative to {os.getcwd()})"
            raise DataError(
                f"{where} {what}{relative}; name existing files, or a glob such as texts/**/*.txt"
            )
        for path in files:
            if not os.access(path, os.R_OK):
                raise DataError(f"{where}: {path} cannot be read by this user; change its permissions")
            found.setdefault(path)
    return list(found)


def _kind(path: str) -> Literal["json", "parquet", "text"]:
    name = path.lower().removesuffix(".gz")
    if name.endswith((".jsonl", ".ndjson", ".json")):
        return "json"
    return "parquet" if name.endswith(".parquet") else "text"


def _file_digest(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as problem:
        raise DataError(f"{path} cannot be read: {problem.strerror}") from None


def _file_documents(data: Files) -> Iterator[tuple[str, str]]:
    for path in _matching_files(data):
        yield from _read_file(path, data.text_field)


def _read_file(path: str, field: str) -> Iterator[tuple[str, str]]:
    readers = {"json": _read_json, "parquet": _read_parquet, "text": _read_text}
    for identifier, text in readers[_kind(path)](path, field):
        try:
            text.encode()
        except UnicodeEncodeError as problem:
            raise DataError(
                f"{identifier}: the text holds half of a surrogate pair at character {problem.start}, which "
                "is not Unicode text; repair or leave out this document"
            ) from None
        if text.strip():
            yield identifier, text


def _open(path: str) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb")) if path.lower().endswith(".gz") else open(path, "rb")


def _read_text(path: str, field: str) -> Iterator[tuple[str, str]]:
    try:
        with _open(path) as file:
            raw = file.read()
    except (OSError, EOFError) as problem:
        raise DataError(f"{path} cannot be read: {hub.one_line(problem)}") from None
    yield path, _decode(raw, path, 0)


def _decode(raw: bytes, path: str, offset: int) -> str:
    try:
        return raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as problem:
        raise DataError(
            f"{path} is not UTF-8 text: byte 0x{raw[problem.start]:02x} at offset {offset + problem.start}; "
            "convert it to UTF-8, or leave it out of data.paths"
        ) from None


def _read_json(path: str, field: str) -> Iterator[tuple[str, str]]:
    offset = 0
    try:
        with _open(path) as file:
            for number, raw in enumerate(file, start=1):
                line = _decode(raw, path, offset)
                offset += len(raw)
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as problem:
                    raise DataError(
                        f"{where} is not JSON ({problem.msg} at column {problem.colno}); a JSON file holds "
                        "one object a line"
                    ) from None
                yield where, _text_of(row, field, where)
    except (OSError, EOFError) as problem:
        raise DataError(f"{path} cannot be read: {hub.one_line(problem)}") from None


def _text_of(row: Any, field: str, where: str) -> str:
    if not isinstance(row, dict):
        raise DataError(
            f"{where} holds a JSON {_json_type(row)}; a JSON file holds one object a line, with the text in "
            f'its field "{field}"'
        )
    if field not in row:
        raise DataError(_missing(f"{where} has no field", field, row))
    value = row[field]
    if not isinstance(value, str):
        raise DataError(
            f'{where}: the field "{field}" holds {_json_type(value)}, not a string; name the field with the '
            "text in data.text_field, or leave out this line"
        )
    return value


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _missing(what: str, field: str, existing: Iterable[str]) -> str:
    names = list(existing)
    listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "") if names else "none"
    return f'{what} "{field}" (data.text_field); there are: {listed}.{suggest(field, names)}'


def _read_parquet(path: str, field: str) -> Iterator[tuple[str, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            schema = file.schema_arrow
            if field not in schema.names:
                raise DataError(_missing(f"{path} has no column", field, schema.names))
            _check_text_type(str(schema.field(field).type), f"{path}: the column", field)
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    if value is None:
                        raise DataError(
                            f'{path}, row {row}: the column "{field}" is null, not text; leave out this row'
                        )
                    yield f"{path}, row {row}", value
    except (pa.ArrowException, OSError) as problem:
        raise DataError(f"{path} is not a readable Parquet file: {hub.one_line(problem)}") from None
    except UnicodeDecodeError as problem:
        raise DataError(
            f'{path}: the column "{field}" is not UTF-8 text after row {row} ({problem.reason})'
        ) from None


def _check_text_type(found: str, what: str, field: str) -> None:
    if "string" not in found or found.startswith(("list", "struct", "map", "{", "[", "List", "Sequence")):
        raise DataError(
            f'{what} "{field}" holds {found}, not strings; name the one with the text in data.text_field'
        )


# --- hub ----------------------------------------------------------------------------------------------


def _local_folder(data: HubData) -> str | None:
    folder = os.path.expanduser(data.path)
    return folder if os.path.isdir(folder) else None


def _commit(data: HubData) -> hub.Commit:
    return hub.resolve(
        data.path, data.revision, "dataset", where=f'data.path = "{data.path}"', error=DataError
    )


def _load_splits(data: HubData, revision: str | None) -> dict[str, Any]:
    """The dataset's splits by name, from a folder, the hub, or the cache where the hub does not answer."""
    import datasets

    folder = _local_folder(data)
    if folder is not None:
        return _loading(data, lambda: datasets.load_dataset(folder, data.name))
    commit = _commit(data if revision is None else data.model_copy(update={"revision": revision}))
    if commit.online:
        return _loading(data, lambda: datasets.load_dataset(data.path, data.name, revision=commit.sha))
    return _loading(data, lambda: _load_cached(data, commit))


def _load_cached(data: HubData, commit: hub.Commit) -> Any:
    """The dataset without a network: as datasets prepared this commit, else from its downloaded files."""
    import datasets
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules.cache.cache import Cache

    # <cache>/<owner>___<name>/<configuration>/<version>/<commit>, as the builders of datasets name it.
    *owner, name = data.path.split("/")
    root = Path(datasets.config.HF_DATASETS_CACHE) / "___".join([*owner, camelcase_to_snakecase(name)])
    made = sorted(root.glob(f"{data.name or '*'}/*/{commit.sha}/dataset_info.json"))
    if not made:
        return datasets.load_dataset(str(commit.snapshot), data.name)
    if len(made) > 1:
        raise ValueError(f"several configurations are cached: {', '.join(path.parts[-4] for path in made)}")
    configuration, version, sha = made[0].parts[-4:-1]
    builder = Cache(
        repo_id=data.path, dataset_name=name, config_name=configuration, version=version, hash=sha
    )
    builder.download_and_prepare()
    return builder.as_dataset()


def _loading(data: HubData, load: Any) -> dict[str, Any]:
    try:
        return cast(dict[str, Any], load())
    # datasets raises its own classes, those of pyarrow, fsspec and the HTTP client, and plain ValueErrors.
    except Exception as problem:
        raise DataError(
            f'data.path = "{data.path}" cannot be loaded as a dataset ({type(problem).__name__}: '
            f"{hub.one_line(problem)}); check data.path, data.name and data.revision"
        ) from None


def _hub_documents(data: HubData, revision: str | None) -> Iterator[tuple[Split, str, str]]:
    loaded = _load_splits(data, revision)
    named = {split: getattr(data, f"{split}_split") for split in SPLITS}
    _check_split_names(data, list(loaded))
    for split in SPLITS:
        if named[split] is None:
            continue
        dataset = loaded[named[split]]
        _check_column(data, dataset.features)
        row = -1
        for batch in dataset.select_columns([data.text_field]).iter(batch_size=1000):
            for text in batch[data.text_field]:
                row += 1
                identifier = f"{named[split]}, row {row}"
                if text is None:
                    raise DataError(
                        f'data.path = "{data.path}", {identifier}: the column "{data.text_field}" is null, '
                        "not text; name a dataset without missing texts"
                    )
                if not text.strip():
                    continue
                # A split that the dataset has takes nothing from the train split.
                where = (
                    split_of(
                        text,
                        0.0 if named["validation"] else data.validation_frac,
                        0.0 if named["test"] else data.test_frac,
                    )
                    if split == "train"
                    else split
                )
                yield where, identifier, text


def _check_split_names(data: HubData, existing: list[str]) -> None:
    for split in SPLITS:
        name = getattr(data, f"{split}_split")
        if name is not None and name not in existing:
            raise DataError(
                f'data.{split}_split = "{name}" is not a split of {data.path}, which has '
                f"{', '.join(existing)}.{suggest(name, existing)}"
            )


def _check_column(data: HubData, features: dict[str, Any]) -> None:
    if data.text_field not in features:
        raise DataError(_missing(f"{data.path} has no column", data.text_field, features))
    _check_text_type(
        str(getattr(features[data.text_field], "dtype", features[data.text_field])),
        f"{data.path}: the column",
        data.text_field,
    )


def _describe_hub(data: HubData) -> CorpusSummary:
    import datasets

    commit = _commit(data)
    source = f"{data.path}{f' ({data.name})' if data.name else ''} at {commit.sha[:12]}"
    if not commit.online:
        # What is cached is on this disk: look whether it can be read, which also makes the Arrow files.
        loaded = _loading(data, lambda: _load_cached(data, commit))
        _check_split_names(data, list(loaded))
        _check_column(data, loaded[data.train_split].features)
        return CorpusSummary(source, None, None, None)
    builder = cast(
        Any,
        _loading(data, lambda: datasets.load_dataset_builder(data.path, data.name, revision=commit.sha)),
    )
    # Both are missing where the dataset's card says nothing; `prepare` finds out then.
    if builder.info.splits:
        _check_split_names(data, list(builder.info.splits))
    if builder.info.features:
        _check_column(data, builder.info.features)
    return CorpusSummary(source, None, None, None)
