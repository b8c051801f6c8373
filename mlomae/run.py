"""One run from its configuration: join the ranks, claim the run directory, train, leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlomae.config import Config
from mlomae.determinism import require_determinism
from mlomae.distributed import collectives
from mlomae.distributed.ds_config import check_combination, load_ds_config
from mlomae.distributed.env import join_world, leave_world, was_requeued
from mlomae.distributed.watchdog import Watchdog
from mlomae.preemption import Preemption
from mlomae.run_dir import RunDir, Status
from mlomae.run_faults import told_in_one_line
from mlomae.trainer import Trainer

# Seconds for which a checkpoint may still be written when this process has to end.
WRITING = 30.0
# Seconds in which a requeued job's last attempt, on a node that Slurm gave up, may still let go of the run.
LEAVING = 120.0


def run(config: Config, ds_path: Path | None, preemption: Preemption) -> dict[str, Any]:
    """Trains and evaluates one run; resumes an unfinished one.

    Args:
        ds_path: DeepSpeed configuration; None trains with plain torch engines.
        preemption: tells when to stop.

    Returns:
        The content of ``result.json`` on rank 0, empty elsewhere.

    Raises:
        UserError: bad input, a run directory of another run, a level that broke, no memory or disk left.
        Preempted: a signal asked to stop.
    """
    ds_config = None if ds_path is None else load_ds_config(ds_path)
    check_combination(config, ds_config)
    patience = config.failure.lost_after, config.failure.stuck_after
    world = join_world(config.device, always_group=ds_config is not None, patience=max(patience))
    run_dir = RunDir(config.run_dir, config)
    if config.deterministic:
        require_determinism()
    try:
        # The watchdog sees what is told: the other ranks end with the same code.
        with Watchdog(world, *patience) as watchdog, told_in_one_line(config.run_dir):
            # Rank 0's answer: a network disk may show the others an older state.
            status = collectives.broadcast_object(run_dir.claim(primary=False))
            if status is Status.COMPLETE:
                return run_dir.read_result() if world.primary else {}
            # Built before the directory is taken: bad data leaves nothing behind.
            trainer = Trainer(config, run_dir, world, ds_config, preemption)
            watchdog.before_end = lambda: trainer.writer.linger(WRITING)
            wait = LEAVING if was_requeued() else 0.0
            collectives.on_primary(lambda: run_dir.claim(primary=True, wait=wait))
            return trainer.fit()
    finally:
        run_dir.release()
        leave_world()
