"""Ranks that average a number for ever until one of them comes to some end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from mlomae.arguments import EXIT_PREEMPTED, EXIT_USER_ERROR
from mlomae.distributed import collectives
from mlomae.distributed.env import join_world, leave_world
from mlomae.distributed.watchdog import Watchdog
from mlomae.errors import Preempted, UserError
from mlomae.ranges import position, profiled
from tests.distributed.ranks import free_port

LOST_AFTER, STUCK_AFTER = 3.0, 5.0
# A rank that hangs is killed: start-up and a verdict take a fraction of this, in seconds.
TIMEOUT = 60.0
# Of an iteration, in seconds: signs of life tell of iterations before the end.
PAUSE = 0.3
LAST = 5


@dataclass(frozen=True)
class Ended:
    """A rank's end: exit code (negative: a signal), stderr without torch's words, seconds since the start."""

    code: int | None
    said: list[str]
    seconds: float


def run_until(end: str, victim: int, size: int, folder: Path) -> list[Ended]:
    """Runs ``size`` ranks, of which ``victim`` meets ``end`` in iteration ``LAST``.

    A rank that is paused is killed once the others have ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlomae.trainer"])
    port, started = free_port(), time.monotonic()
    ranks = [
        context.Process(target=_rank, args=(rank, size, port, end, victim, folder)) for rank in range(size)
    ]
    for rank in ranks:
        rank.start()
    seconds: dict[int, float] = {}
    while time.monotonic() < started + TIMEOUT:
        for number, rank in enumerate(ranks):
            if number not in seconds and not rank.is_alive():
                seconds[number] = time.monotonic() - started
        waiting = set(range(size)) - seconds.keys()
        if waiting <= ({victim} if end == "paused" else set()):
            break
        time.sleep(0.02)
    for rank in ranks:
        rank.kill()
        rank.join()
    return [
        Ended(rank.exitcode, _lines(folder / f"stderr-{number}"), seconds.get(number, TIMEOUT))
        for number, rank in enumerate(ranks)
    ]


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if not line.startswith("[W")]


def _rank(rank: int, size: int, port: int, end: str, victim: int, folder: Path) -> None:
    os.dup2(os.open(folder / f"stderr-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    # As a run does that finishes its iteration first: no launcher ends it by that.
    signal.signal(signal.SIGTERM, lambda *_: None)
    torch.set_num_threads(1)
    world = join_world("cpu")
    try:
        with Watchdog(world, LOST_AFTER, STUCK_AFTER):
            for iteration in range(2 * LAST):
                position.begin(iteration)
                with profiled("data"):
                    if world.rank == victim and iteration == LAST:
                        _meet(end)
                with profiled("pretrain/descend"):
                    time.sleep(PAUSE)
                    collectives.average([torch.ones(2)])
    except UserError:
        sys.exit(EXIT_USER_ERROR)
    except Preempted:
        sys.exit(EXIT_PREEMPTED)
    finally:
        leave_world()


def _meet(end: str) -> None:
    match end:
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "paused":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "resumed":
            if not os.fork():
                time.sleep(LOST_AFTER + 1)
                os.kill(os.getppid(), signal.SIGCONT)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGSTOP)
        case "stuck":
            time.sleep(2 * TIMEOUT)
        case "slow":
            time.sleep(LOST_AFTER + 1)
        case "refused":
            raise UserError("data.root: cannot be read")
        case "preempted":
            raise Preempted
        case "wrong":
            raise ZeroDivisionError("division by zero")
