"""The report of a study: one HTML page, made from its Parquet tables and its `study.yaml` alone.

python -m raydisp.report DIR                      DIR/report.html
python -m raydisp.report DIR --watch              the same, served and renewed while the study runs
python -m raydisp.report DIR --figures FOLDER     PNG and SVG of every figure, for papers
python -m raydisp.report DIR DIR ... [--out FILE] one page that compares studies: comparison.html
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import yaml

from raydisp.errors import OutputError
from raydisp.report.page import objectives_of, render, study_panels
from raydisp.results import Tables, read_tables
from raydisp.storage import join, read_bytes, resolve, write_bytes

logger = logging.getLogger(__name__)


class NothingYetError(OutputError):
    """There is nothing to report, which may change."""


COMPARISON = "comparison.html"
"""Where the comparison of several studies goes, if nothing is said."""


def build_report(study_dir: str, *, out: str | None = None) -> str:
    """Write `report.html` into a results folder, whole or not at all, and return its place.

    Args:
        out: another place for the page.
    Raises: as `make_report`; and OutputError, if it cannot be written.
    """
    text = make_report(study_dir)
    place = join(study_dir, "report.html") if out is None else out
    write_bytes(place, text.encode())
    return place


def make_report(study_dir: str) -> str:
    """The page.

    Args:
        study_dir: the folder of one study, a local path or a URI that `pyarrow.fs` knows.
    Raises:
        NothingYetError: there is no such folder, or no trial in it.
        OutputError: it is no folder, or cannot be read.
    """
    return render(*_read(study_dir))


def build_comparison(study_dirs: Sequence[str], *, out: str = COMPARISON) -> str:
    """Write one page that compares studies, and return its place.

    Raises:
        OutputError: as `build_report` says.
    """
    from raydisp.report import comparison

    found = [(folder, *_read(folder)) for folder in study_dirs]
    write_bytes(out, comparison.render(comparison.named(found)).encode())
    return out


def build_figures(study_dir: str, folder: str) -> list[str]:
    """Write every figure of a study as PNG and as SVG, and return their places.

    Raises:
        OutputError: as `build_report` says; or matplotlib is not installed.
    """
    from raydisp.figures.paper import write_figures

    tables, study = _read(study_dir)
    return write_figures(study_panels(tables, objectives_of(study)), folder)


def _read(study_dir: str) -> tuple[Tables, Mapping[str, Any]]:
    try:
        filesystem, path = resolve(study_dir)
        kind = filesystem.get_file_info(path).type
        tables = read_tables(study_dir) if kind == pafs.FileType.Directory else None
        study = _read_study(study_dir) if tables is not None and tables.trials.num_rows else {}
    except (OSError, pa.ArrowException) as error:
        raise OutputError(f"{study_dir} cannot be read: {' '.join(str(error).split())}") from None
    if kind == pafs.FileType.NotFound:
        raise NothingYetError(f"{study_dir} does not exist; name the results folder of a study")
    if tables is None:
        raise OutputError(f"{study_dir} is a file; name the results folder of a study")
    if tables.trials.num_rows == 0:
        raise NothingYetError(
            f"{study_dir} holds no results: there is no trial in {join(study_dir, 'trials')}; "
            "name the results folder of one study"
        )
    return tables, study


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
