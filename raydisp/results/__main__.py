"""`python -m raydisp.results`."""

import sys

from raydisp.results.command import main

if __name__ == "__main__":
    sys.exit(main())
