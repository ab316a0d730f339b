"""`python -m neuromamba` is `neuromamba`."""

import sys

from neuromamba.cli import main

if __name__ == "__main__":
    sys.exit(main())
