"""Reads batches of all levels, says what they hold, and starts readers that may be killed at any time.

As a program it reads jobs, one JSON object a line, and answers each with one. A job forks a reader for each
rank and kills them, with their loader processes, after a while. A program of its own, since starting an
interpreter for each takes seconds, and forking wants a process without busy threads.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch
from zlib import crc32

import torch

from mlomae.config import Config
from mlomae.data.batches import Batch, PixelBatch
from mlomae.data.loader import LevelLoaders, Part
from mlomae.data.subset import Subset

LEVELS = ("pretrain", "head", "mask")
TIMEOUT = 60.0  # seconds within which the first step must be done

Rows = list[str]
"""``<key> <label> <checksum of the pixels>`` of each image of a batch."""


@contextmanager
def noted() -> Iterator[Rows]:
    """Collects what the batches hold that are read meanwhile, in this process's order."""
    rows: Rows = []
    normalised = PixelBatch.normalised

    def note(batch: PixelBatch, subset: Subset) -> Batch:
        keys, labels = subset.source.keys, batch.labels
        assert labels is not None
        for index, label, pixels in zip(batch.indices.tolist(), labels.tolist(), batch.pixels, strict=True):
            rows.append(f"{keys[index]} {label} {crc32(pixels.numpy().tobytes()):08x}")
        return normalised(batch, subset)

    with patch.object(PixelBatch, "normalised", note):
        yield rows


class KeyReader:
    """The streams of one rank."""

    def __init__(self, config: Config, rank: int = 0, world_size: int = 1) -> None:
        self.loaders = LevelLoaders(config, rank, world_size)
        self._streams = {level: getattr(self.loaders, level) for level in LEVELS}

    def next(self, level: str) -> Rows:
        """What the next batch of a level holds."""
        with noted() as rows:
            self._streams[level].next()
        return rows

    def step(self, number: int) -> dict[str, Rows]:
        """The next batches of the levels that are due."""
        return {level: self.next(level) for level in due(number)}

    def all_of(self, part: Part) -> Rows:
        """A whole set, in its order."""
        with noted() as rows:
            for _ in self.loaders.evaluation(part):
                pass
        return rows

    def state_dict(self) -> dict[str, Any]:
        return {level: stream.state_dict() for level, stream in self._streams.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for level, stream in self._streams.items():
            stream.load_state_dict(state[level])

    def close(self) -> None:
        self.loaders.close()


def due(step: int) -> tuple[str, ...]:
    """The levels that read in a step: as in a training, the last one does not read in each."""
    return LEVELS if step % 3 == 2 else LEVELS[:2]


def state_file(folder: Path) -> Path:
    """The last checkpoint: {"step": steps done, "streams": their state}."""
    return folder / "state.json"


def log_file(folder: Path, rank: int) -> Path:
    """What a rank has read: a line [step, level, rows] for each batch."""
    return folder / f"rank-{rank}.jsonl"


def read_log(path: Path, steps: int) -> tuple[list[tuple[int, str, Rows]], int]:
    """The lines of the first ``steps`` steps, and the bytes that they take; what follows them is lost."""
    lines, size = [], 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        # Of a write that was killed half may be there.
        if not line.endswith(b"\n") or (entry := json.loads(line))[0] >= steps:
            break
        lines.append((entry[0], entry[1], entry[2]))
        size += len(line)
    return lines, size


def _read(job: dict[str, Any], rank: int, peer: socket.socket | None, started: int) -> NoReturn:
    """Continues from the last checkpoint, with one after each step of all ranks, until it is killed."""
    folder = Path(job["folder"])
    reader = KeyReader(Config.model_validate(job["config"]), rank, job["ranks"])
    step = 0
    if state_file(folder).exists():
        state = json.loads(state_file(folder).read_text())
        step = state["step"]
        reader.load_state_dict(state["streams"])
    log = log_file(folder, rank)
    with log.open("ab", buffering=0) as file:
        file.truncate(read_log(log, step)[1])
        while True:
            for level in due(step):
                file.write(json.dumps([step, level, reader.next(level)]).encode() + b"\n")
            step += 1
            if peer is not None:
                peer.sendall(b".")
                assert peer.recv(1), "the other rank has failed"
            if rank == 0:
                temporary = folder / "state.tmp"
                temporary.write_text(json.dumps({"step": step, "streams": reader.state_dict()}))
                os.replace(temporary, state_file(folder))
                os.write(started, b".")


def _start(job: dict[str, Any], rank: int, group: int, peer: socket.socket | None, started: int) -> int:
    pid = os.fork()
    if pid:
        os.setpgid(pid, group or pid)
        return pid
    os.setpgid(0, group)
    try:
        _read(job, rank, peer, started)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _start_and_kill(job: dict[str, Any]) -> dict[str, Any]:
    """Kills the readers ``seconds`` after their start, or after their first step if they are to have one.

    Returns:
        The time until that step, if it was waited for, and how each rank ended.
    """
    begin = time.monotonic()
    done, started = os.pipe()
    peers = socket.socketpair() if job["ranks"] == 2 else (None, None)
    pids: list[int] = []
    for rank in range(job["ranks"]):
        pids.append(_start(job, rank, pids[0] if pids else 0, peers[rank], started))
    if job["first_step"]:
        select.select([done], [], [], TIMEOUT)
    until_first = time.monotonic() - begin
    time.sleep(job["seconds"])
    os.killpg(pids[0], signal.SIGKILL)
    ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    for descriptor in (done, started):
        os.close(descriptor)
    for peer in peers:
        if peer is not None:
            peer.close()
    return {"until_first": until_first, "ends": ends}


def main() -> None:
    torch.set_num_threads(1)
    # What is imported at the first use is here for all readers.
    KeyReader(Config.model_validate(json.loads(input()))).step(2)
    # A collection in a reader would touch, and so copy, all that it shares with this process.
    gc.collect()
    gc.freeze()
    warnings.simplefilter("ignore")  # torch advises against more loader processes than processors
    for line in sys.stdin:
        print(json.dumps(_start_and_kill(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
