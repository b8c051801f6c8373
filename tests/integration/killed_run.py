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
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

import torch

from mlomae import checkpoint
from mlomae.cli import main
from tests.integration.tiny import without_evaluation

KILLS = 30
# What a run imports: once, here, instead of in every fork.
IMPORTED = ("mlomae.run", "mlomae.preview", "sklearn.datasets", "torch.utils.tensorboard")
# Seconds, at most, from what is waited for to the kill: from the start, from the first checkpoint, and from
# when one begins to be written.
START, TRAINING, WRITING = 1.5, 0.4, 0.01
PATIENCE = 120.0


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
        if number % 5 == 0:
            time.sleep(moments.uniform(0, START))
        else:
            wait_for(partial(has_later, folder, before))
            if number % 2:
                wait_for(lambda: any(folder.glob(".tmp-*")))
                time.sleep(moments.uniform(0, WRITING))
            else:
                time.sleep(moments.uniform(0, TRAINING))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"run {number} ended with {os.waitstatus_to_exitcode(status)}"
        writing += any(folder.glob(".tmp-*"))
        after = newest_step(folder)
        assert after >= before, f"kill {number} lost checkpoint {before}; the newest is {after}"
        progressed += after > before
    return writing, progressed


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"the run did not get on within {PATIENCE} s"
        time.sleep(0.001)


def has_later(folder: Path, step: int) -> bool:
    return any(later > step for later in steps(folder))


def steps(folder: Path) -> list[int]:
    """Of all checkpoints, intact or not."""
    return [int(path.name[5:13]) for path in folder.glob("step-*")]


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint, 0 without one; all there are have to be intact."""
    intact = checkpoint.newest(folder)  # warns about damaged ones, and warnings are errors here
    assert intact is not None or not steps(folder), f"none of {steps(folder)} can be read"
    return 0 if intact is None else checkpoint.read(intact).step


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    without_evaluation()
    for name in IMPORTED:
        import_module(name)
    recipe, run_dir = sys.argv[1:]
    argv = ["train", "--config", recipe, "--run-dir", run_dir]
    writing, progressed = kill_often(argv, Path(run_dir) / "checkpoints")
    print(f"{KILLS} kills, {writing} of them while a checkpoint was written, {progressed} after new ones")
    assert writing >= 3 and progressed >= KILLS // 2
    sys.exit(main(argv))
