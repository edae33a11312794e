"""`python -m raydisp.verdict`."""

import sys

from raydisp.verdict.command import main

if __name__ == "__main__":
    sys.exit(main())
