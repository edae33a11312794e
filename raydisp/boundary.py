"""Where a command ends: what went wrong as one sentence and an exit status, never as a traceback."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable

from raydisp.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_USER_ERROR, RaydispError
from raydisp.interrupts import terminate_as_interrupt


def run_command(
    name: str,
    run: Callable[[], int | None],
    *,
    interrupted: str = "interrupted; nothing was written by halves",
) -> int:
    """Run a command to its end, whatever that is; returns the exit status.

    Args:
        name: of the command, before each sentence: "raydisp.report".
        run: the command; its status, None where it is done.
        interrupted: what is said after Ctrl-C or SIGTERM.
    """
    try:
        with terminate_as_interrupt():
            status = run()
        sys.stdout.flush()
    except RaydispError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print(f"\n{name}: {interrupted}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read has seen enough (`| head`); what Python still wants to write at exit goes nowhere.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except OSError as error:
        # Of a folder that may not be read, or an object store that does not answer.
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USER_ERROR
    return EXIT_DONE if status is None else status
