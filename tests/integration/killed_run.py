"""Kills a run at random moments, again and again, until it is done; exits with 0 if nothing was ever lost.

A program of its own, since forking wants a process without busy threads. Arguments: recipe, run directory.
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

from mlomae import checkpoint
from mlomae.cli import main
from tests.integration.tiny import without_evaluation

KILLS = 30
# Longer than a start takes, so that runs get on; shorter than the training, so that none ends.
SHORTEST, LONGEST = 0.1, 1.6


def train(argv: list[str]) -> None:
    """A run in a fork of its own, which ends with it."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    os._exit(main(argv))


def kill_often(argv: list[str], folder: Path) -> tuple[int, int]:
    """Starts and kills; (kills while a checkpoint was being written, restarts that got on)."""
    moments = random.Random(0)
    writing = progressed = 0
    for number in range(KILLS):
        before = newest_step(folder)
        child = os.fork()
        if child == 0:
            train(argv)
        time.sleep(moments.uniform(SHORTEST, LONGEST))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"run {number} ended by itself with {os.waitstatus_to_exitcode(status)}"
        writing += any(folder.glob(".tmp-*"))
        after = newest_step(folder)
        assert after >= before, f"kill {number} lost checkpoint {before}; the newest is {after}"
        progressed += after > before
    return writing, progressed


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint, 0 without one; all there are have to be intact."""
    intact = checkpoint.newest(folder)  # warns about damaged ones, and warnings are errors here
    steps = [path.name for path in folder.glob("step-*")]
    assert intact is not None or not steps, f"none of {steps} can be read"
    return 0 if intact is None else checkpoint.read(intact).step


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    without_evaluation()
    recipe, run_dir = sys.argv[1:]
    argv = ["train", "--config", recipe, "--run-dir", run_dir]
    writing, progressed = kill_often(argv, Path(run_dir) / "checkpoints")
    print(f"{KILLS} kills, {writing} of them while a checkpoint was written, {progressed} after new ones")
    assert writing >= 3 and progressed >= 10
    sys.exit(main(argv))
