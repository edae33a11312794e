"""The study file's `data`: where the text comes from, and how it is split."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from raydisp.config.section import Int, Section


class _Data(Section):
    context_length: Annotated[Int, Field(ge=8, le=1_000_000, description="tokens in one sequence")] = 128
    validation_frac: Annotated[float, Field(gt=0.0, lt=0.5, description="of the documents")] = 0.05
    test_frac: Annotated[float, Field(gt=0.0, lt=0.5, description="of the documents")] = 0.05


class PythonDocs(_Data):
    """The English prose that ships with the running CPython: language topics and docstrings."""

    source: Annotated[Literal["python_docs"], Field(description="the documentation of CPython")]


class Files(_Data):
    """Text (one document a file), JSON lines and Parquet (one document a row), by path or glob."""

    source: Annotated[Literal["files"], Field(description="files of your own")]
    paths: Annotated[
        list[str],
        Field(
            min_length=1,
            description="files or globs, ** included; .jsonl, .ndjson, .json, .parquet, else text; .gz too",
        ),
    ]
    text_field: Annotated[
        str, Field(min_length=1, description="the field of a JSON line or the column of a Parquet file")
    ] = "text"


class HubData(_Data):
    """A dataset of the Hugging Face hub (or its local cache, or a local folder) by datasets.load_dataset.

    Splits named in the dataset are used as they are; one that it lacks is split off `train_split` by a
    stable hash of the document.
    """

    source: Annotated[Literal["hub"], Field(description="of the Hugging Face hub")]
    path: Annotated[str, Field(min_length=1, description="such as Salesforce/wikitext, or a local folder")]
    name: Annotated[str | None, Field(description="configuration of the dataset")] = None
    revision: Annotated[
        str | None, Field(description="branch, tag or commit; resolved to a commit once per study")
    ] = None
    text_field: Annotated[str, Field(min_length=1, description="the column with the text")] = "text"
    train_split: Annotated[str, Field(min_length=1, description="its split to train on")] = "train"
    validation_split: Annotated[
        str | None, Field(description="its split to choose on; null: split off train_split")
    ] = None
    test_split: Annotated[
        str | None, Field(description="its split for the confirm phase; null: split off train_split")
    ] = None


DataConfig = Annotated[PythonDocs | Files | HubData, Field(discriminator="source")]
