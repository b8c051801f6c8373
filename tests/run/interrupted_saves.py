"""Kills a process that saves without pause, again and again; exits with 0 if no checkpoint was ever lost.

A program of its own, since forking wants a process without busy threads.
"""

from __future__ import annotations

import os
import random
import select
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file

from mlomae.checkpoint import BackgroundWriter, Checkpoint, Score, best, newest, read

KILLS = 10


def save_for_ever(folder: Path, begun: int) -> None:
    """Continues from the newest checkpoint like a run does, and saves every step twice.

    Args:
        begun: receives a byte when a write has begun, and so the one before it has ended.
    """
    path = newest(folder)
    step = read(path).step if path else 0
    writer = BackgroundWriter(folder, keep=2)
    while True:
        names = ("pretrain.weight.encoder.a", "pretrain.weight.decoder.b", "head.weight.c")
        tensors = {name: torch.full((50_000,), float(step)) for name in names}
        for _ in range(2):
            # The first step is the best one, which has to stay.
            writer.submit(step, tensors, {"step": step}, Score("loss", float(step)))
            os.write(begun, b".")
        step += 1


def check(found: Checkpoint) -> None:
    assert found.state == {"step": found.step}
    assert len(found.tensors) == 3
    assert all(bool((tensor == found.step).all()) for tensor in found.tensors.values())


def main(run_dir: Path) -> None:
    warnings.simplefilter("error", UserWarning)  # a damaged checkpoint would be reported as a warning
    torch.set_num_threads(1)
    folder = run_dir / "checkpoints"
    moments = random.Random(0)
    done, begun = os.pipe()
    step, interrupted = -1, 0
    for _ in range(KILLS):
        child = os.fork()
        if child == 0:
            save_for_ever(folder, begun)
        # Counted, not timed: a busy machine gets as far. With four, a new step is saved.
        for _ in range(moments.randint(1, 6)):
            assert select.select([done], [], [], 60)[0], "no save within a minute"
            os.read(done, 1)
        time.sleep(moments.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while select.select([done], [], [], 0)[0]:
            os.read(done, 1)  # of the dead
        interrupted += any(folder.glob(".tmp-*"))
        path = newest(folder)
        if path is None:
            assert step == -1, "the checkpoint was lost"
            continue
        found = read(path)
        assert found.step >= step, "the run went back"
        step = found.step
        check(found)
        first = best(folder)
        assert first is not None
        check(read(first))
        assert read(first).step == 0, "the best checkpoint was lost"
        # It is published before its checkpoint is.
        encoder = load_file(run_dir / "encoder.safetensors")["a"]
        assert encoder.unique().tolist() in ([step], [step + 1]), "the encoder is another one's"
    assert interrupted > 0, "no kill came in the middle of a save"
    assert step > 0, "nothing was saved"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
