"""``python dies.py ITERATION …``: trains as train.py does, but rank 1 dies before ITERATION, once."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mlomae.cli import main
from tests.integration.tiny import train_and_die

if __name__ == "__main__":
    iteration, *words = sys.argv[1:]
    argv = ["train", *words]
    if os.environ["RANK"] == "1" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        train_and_die(argv, int(iteration))
    sys.exit(main(argv))
