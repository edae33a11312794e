"""The report of a study: one HTML page, made from its Parquet tables and its `study.yaml` alone.

python -m raydisp.report DIR                      DIR/report.html
python -m raydisp.report DIR --watch              the same, served and renewed while the study runs
python -m raydisp.report DIR --figures FOLDER     PNG and SVG of every figure, for papers
python -m raydisp.report DIR DIR ... [--out FILE] one page that compares studies: comparison.html
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import yaml

from raydisp.boundary import run_command
from raydisp.errors import OutputError
from raydisp.page import objectives_of, render, study_panels
from raydisp.results import Tables, read_tables
from raydisp.storage import join, local_absolute, read_bytes, resolve, write_bytes

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
    from raydisp import comparison

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


def main(argv: Iterable[str] | None = None) -> int:
    """Command line: write the report of a results folder, or serve it. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m raydisp.report",
        description="Make report.html from the results of a study, or one page that compares several.",
    )
    parser.add_argument(
        "dirs", metavar="DIR", nargs="+", help="results folder of a study, local or s3://, gs://"
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help=f"where the page goes: DIR/report.html, {COMPARISON} for several studies",
    )
    parser.add_argument(
        "--figures",
        metavar="FOLDER",
        help="write every figure as PNG and SVG there, and no page without --out",
    )
    parser.add_argument(
        "--watch",
        action="store_true",
        help="serve the report on this machine and renew it as results come in, until Ctrl-C; nothing is "
        "written",
    )
    parser.add_argument("--port", type=int, metavar="N", help="of --watch; a free one is taken by default")
    parser.add_argument(
        "--host", metavar="H", help="of --watch; 127.0.0.1 by default, so that other machines see nothing"
    )
    arguments = parser.parse_args(None if argv is None else list(argv))
    if "" in (*arguments.dirs, arguments.out, arguments.figures):
        parser.error("a place is empty; name the results folder of a study, a FILE or a FOLDER")
    if not arguments.watch and (arguments.port is not None or arguments.host is not None):
        parser.error("--port and --host belong to --watch")
    if arguments.watch and (arguments.out or arguments.figures or len(arguments.dirs) > 1):
        parser.error("--watch serves the report of one study and writes nothing; leave the rest out")
    return run_command("raydisp.report", lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    if arguments.watch:
        from raydisp.watch import DEFAULT_HOST, watch

        watch(arguments.dirs[0], arguments.host or DEFAULT_HOST, arguments.port or 0)
        return
    # A study that is named twice is one study.
    dirs = {local_absolute(place).rstrip("/"): place for place in reversed(arguments.dirs)}
    for place in _make([*reversed(dirs.values())], arguments.out, arguments.figures):
        print(place)


def _make(dirs: Sequence[str], out: str | None, figures: str | None) -> Iterator[str]:
    if figures is not None:
        if len(dirs) > 1:
            raise OutputError("--figures is of one study; name one results folder")
        places = build_figures(dirs[0], figures)
        if not places:
            raise OutputError(f"{dirs[0]} has no figure that could be drawn; its report.html says why")
        yield from places
    if len(dirs) > 1:
        yield build_comparison(dirs, out=out or COMPARISON)
    elif figures is None or out is not None:
        yield build_report(dirs[0], out=out)


if __name__ == "__main__":
    sys.exit(main())
