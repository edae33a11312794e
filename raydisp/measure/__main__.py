"""`python -m raydisp.measure`."""

import sys

from raydisp.measure.command import main

if __name__ == "__main__":
    sys.exit(main())
