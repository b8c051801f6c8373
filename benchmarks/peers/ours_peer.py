"""Our own trainer, driven through ``Trainer.iterate`` as a run drives it."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers.measure import Peer, main
from benchmarks.peers.problem import OURS, ReadAhead
from mlomae.config import Config
from mlomae.distributed.env import join_world
from mlomae.run_dir import RunDir
from mlomae.trainer import Trainer


def build(config: Config, folder: Path, iterations: int) -> Peer:
    trainer = Trainer(config, RunDir(folder, config), join_world("cpu"), None)
    levels = trainer.levels
    for name, level in levels.by_name().items():
        steps = config.pretrain.unroll_steps if name == "pretrain" else 1
        level.stream = ReadAhead(level.stream, steps * iterations)

    def iterate(number: int) -> None:
        trainer.iterate(number)

    network = None if levels.mask is None else levels.mask.engine.module
    return Peer(iterate, None if network is None else network.score.weight)


if __name__ == "__main__":
    main("ours", build, variants=OURS)
