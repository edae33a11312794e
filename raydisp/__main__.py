"""`raydisp COMMAND ...` and `python -m raydisp COMMAND ...`: the module commands under one name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import raydisp
from raydisp.errors import suggest

COMMANDS = {
    "study": ("raydisp.study", "run a study: search, results, report"),
    "report": ("raydisp.report.command", "build the report of a results folder anew"),
    "verdict": ("raydisp.verdict.command", "judge a confirm phase anew, from its Parquet files alone"),
    "export": ("raydisp.export", "write a confirmed model as a Hugging Face folder"),
    "measure": (
        "raydisp.measure.command",
        "measure how far the token vectors of any model condense with depth",
    ),
    "results": ("raydisp.results.command", "show the trials of a results folder, or merge its small files"),
}
"""Name -> its module, and what it does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Hand over to a command's own `main`; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    usage = "usage: raydisp COMMAND ...\n\n" + "\n".join(
        f"  {name:<8} {text} (python -m raydisp.{name})" for name, (_, text) in COMMANDS.items()
    )
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"raydisp {raydisp.__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        hint = suggest(arguments[0], COMMANDS)
        print(f'"{arguments[0]}" is not one of {", ".join(COMMANDS)}.{hint}', file=sys.stderr)
        return 2
    module = importlib.import_module(COMMANDS[arguments[0]][0])
    status: int = module.main(arguments[1:])
    return status


if __name__ == "__main__":
    sys.exit(main())
