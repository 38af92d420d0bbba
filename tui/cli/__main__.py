"""`python -m tui.cli` is `qd`."""

import sys

from tui.cli.program import main

if __name__ == "__main__":
    sys.exit(main())
