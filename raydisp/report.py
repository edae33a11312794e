"""The report of a study: one HTML page, made from its Parquet tables and its `study.yaml` alone.

python -m raydisp.report DIR
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import yaml

from raydisp.errors import OutputError, RaydispError
from raydisp.page import render
from raydisp.results import read_tables
from raydisp.storage import join, read_bytes, resolve, write_bytes

logger = logging.getLogger(__name__)


def build_report(study_dir: str) -> str:
    """Write `report.html` into a results folder, whole or not at all, and return its place.

    Args:
        study_dir: the folder of one study, a local path or a URI that `pyarrow.fs` knows.
    Raises:
        OutputError: there is no such folder, it holds no results, or it cannot be read or written.
    """
    try:
        filesystem, path = resolve(study_dir)
        kind = filesystem.get_file_info(path).type
        tables = read_tables(study_dir) if kind == pafs.FileType.Directory else None
        study = _read_study(study_dir) if tables else {}
    except (OSError, pa.ArrowException) as error:
        raise OutputError(f"{study_dir} cannot be read: {' '.join(str(error).split())}") from None
    if kind == pafs.FileType.NotFound:
        raise OutputError(f"{study_dir} does not exist; name the results folder of a study")
    if tables is None:
        raise OutputError(f"{study_dir} is a file; name the results folder of a study")
    if tables.trials.num_rows == 0:
        raise OutputError(
            f"{study_dir} holds no results: there is no trial in {join(study_dir, 'trials')}; "
            "name the results folder of one study"
        )
    place = join(study_dir, "report.html")
    write_bytes(place, render(tables, study).encode())
    return place


def _read_study(study_dir: str) -> Mapping[str, Any]:
    try:
        study = yaml.safe_load(read_bytes(join(study_dir, "study.yaml")))
    except FileNotFoundError:
        logger.warning("%s has no study.yaml; the report takes val_loss, min, as objective", study_dir)
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        logger.warning("%s/study.yaml cannot be read (%s); the report does without", study_dir, error)
        return {}
    return study if isinstance(study, Mapping) else {}


def main(argv: Iterable[str] | None = None) -> int:
    """Command line: write the report of a results folder. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m raydisp.report", description="Make report.html from the results of a study."
    )
    parser.add_argument("dir", metavar="DIR", help="results folder of a study, local or s3://, gs://")
    arguments = parser.parse_args(None if argv is None else list(argv))
    try:
        print(build_report(arguments.dir))
    except RaydispError as error:
        print(f"raydisp.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
