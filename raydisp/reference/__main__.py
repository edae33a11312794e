"""`python -m raydisp.reference`."""

import sys

from raydisp.reference.pages import main

if __name__ == "__main__":
    sys.exit(main())
