"""``python -m mlomae``: the same as the command ``mlomae``."""

import sys

from mlomae.cli import main

if __name__ == "__main__":
    sys.exit(main())
