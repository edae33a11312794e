"""The command of `raydisp.report`: write the report of a results folder, compare several, or serve one."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence

from raydisp.boundary import run_command
from raydisp.errors import OutputError
from raydisp.report import COMPARISON, build_comparison, build_figures, build_report
from raydisp.report.watch import DEFAULT_HOST, watch
from raydisp.storage import local_absolute


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
