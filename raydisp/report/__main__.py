"""`python -m raydisp.report`."""

import sys

from raydisp.report.command import main

if __name__ == "__main__":
    sys.exit(main())
