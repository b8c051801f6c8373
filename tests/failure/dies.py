"""``python dies.py END ITERATION …``: trains as train.py does, but rank 1 meets END before ITERATION, once.

END is ``killed``, or ``memory``: there is none left.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mlomae.cli import main
from tests.integration.tiny import kill, train_and_meet


def run_out_of_memory() -> None:
    raise MemoryError


if __name__ == "__main__":
    end, iteration, *words = sys.argv[1:]
    argv = ["train", *words]
    if os.environ["RANK"] == "1" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        sys.exit(train_and_meet({"killed": kill, "memory": run_out_of_memory}[end], argv, int(iteration)))
    sys.exit(main(argv))
