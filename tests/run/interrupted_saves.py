"""Kills a process that saves without pause, again and again; exits with 0 if no checkpoint was ever lost.

A program of its own, since forking wants a process without busy threads.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import torch

from mlomae.checkpoint import latest, save

KILLS = 10


def save_for_ever(folder: Path) -> None:
    """Continues from the latest checkpoint like a run does, and saves every step twice."""
    found = latest(folder)
    step = found.step if found else 0
    while True:
        tensors = {name: torch.full((50_000,), float(step)) for name in ("a", "b", "c")}
        for _ in range(2):
            save(folder, step, tensors, {"step": step}, keep=2)
        step += 1


def main(folder: Path) -> None:
    warnings.simplefilter("error", UserWarning)  # a damaged checkpoint would be reported as a warning
    torch.set_num_threads(1)
    delays = random.Random(0)
    step, interrupted = -1, 0
    for _ in range(KILLS):
        child = os.fork()
        if child == 0:
            save_for_ever(folder)
        time.sleep(delays.uniform(0.02, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        interrupted += any(folder.glob(".tmp-*"))
        found = latest(folder)
        if found is None:
            assert step == -1, "the checkpoint was lost"
            continue
        assert found.step >= step, "the run went back"
        step = found.step
        assert found.state == {"step": step}
        assert set(found.tensors) == {"a", "b", "c"}
        assert all(bool((tensor == step).all()) for tensor in found.tensors.values())
    assert interrupted > 0, "no kill came in the middle of a save"
    assert step > 0, "nothing was saved"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
