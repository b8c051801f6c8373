"""Readers that are killed 50 times read what an uninterrupted one does; ranks and workers share the work."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest

from mlomae.config import Config
from mlomae.data.loader import Part
from mlomae.data.shards.source import FileReader
from mlomae.errors import UserError
from tests.integration import read_keys
from tests.integration.bad_shards import WAYS, label, pixels, write_shards
from tests.integration.read_keys import LEVELS, KeyReader, Rows, log_file, read_log
from tests.integration.tiny import tiny_config, train

KILLS = 50
SHARDS, SAMPLES = 6, 20
BATCH = 8
ACCESSES = ("random", "sequential")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few samples are bad."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, SHARDS, SAMPLES, {5 + 11 * number: way for number, way in enumerate(WAYS)})
    return folder


@pytest.fixture(scope="module")
def good_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good_shards")
    write_shards(folder, SHARDS, 2 * SAMPLES)
    return folder


def tree(folder: Path, access: str, workers: int = 0, **data: Any) -> dict[str, Any]:
    return {
        "device": "cpu",
        "model": {"img_size": 16, "patch_size": 4, "in_chans": 3},
        "data": {
            "dataset": "shards",
            "path": str(folder),
            "access": access,
            "workers": workers,
            "resident": "never",
            "augment": "crop-flip",
            "shuffle_buffer": 4 * BATCH,
            "max_bad_share": 0.1,
            **data,
        },
        **{level: {"batch_size": BATCH} for level in LEVELS},
    }


def reader(
    folder: Path, access: str, rank: int = 0, world_size: int = 1, workers: int = 0, **data: Any
) -> KeyReader:
    return KeyReader(Config.model_validate(tree(folder, access, workers, **data)), rank, world_size)


class Reference:
    """What one rank reads without interruption, as far as it is asked for."""

    def __init__(self, folder: Path, access: str) -> None:
        self._reader = reader(folder, access)
        self._steps: list[dict[str, Rows]] = []

    def steps(self, number: int) -> list[dict[str, Rows]]:
        while len(self._steps) < number:
            self._steps.append(self._reader.step(len(self._steps)))
        return self._steps[:number]


@pytest.fixture(scope="module")
def references(shards: Path) -> dict[str, Reference]:
    return {access: Reference(shards, access) for access in ACCESSES}


class Readers:
    """The program ``read_keys``."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def say(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def start_and_kill(self, **job: Any) -> float:
        """Seconds until the first step was done."""
        self.say(job)
        assert self._process.stdout is not None
        answer = json.loads(self._process.stdout.readline())
        assert answer["ends"] == [-9] * job["ranks"], "a reader failed before it was killed"
        return float(answer["until_first"])


@pytest.fixture(scope="module")
def readers(shards: Path) -> Iterator[Readers]:
    process = subprocess.Popen(
        [sys.executable, read_keys.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        program = Readers(process)
        program.say(tree(shards, "random"))
        yield program


# Access, ranks, and the workers of each start in turn.
CASES: list[tuple[str, int, tuple[int, ...]]] = [
    (access, ranks, (workers,)) for access in ACCESSES for ranks in (1, 2) for workers in (0, 2)
]
CASES.append(("sequential", 1, (0, 1, 2, 3)))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("access", "ranks", "workers"), CASES)
def test_killed_readers_read_what_an_uninterrupted_one_does(
    access: str,
    ranks: int,
    workers: tuple[int, ...],
    shards: Path,
    references: dict[str, Reference],
    readers: Readers,
    tmp_path: Path,
) -> None:
    draw = random.Random(f"{access} {ranks} {workers}")
    until_first = 0.1
    steps = without_a_step = within_a_step = 0
    for kill in range(KILLS):
        config = tree(shards, access, workers[kill % len(workers)])
        job = {"config": config, "ranks": ranks, "folder": str(tmp_path)}
        if kill % 5:  # while the set is opened, loader processes start, or the first batches are read
            readers.start_and_kill(**job, first_step=False, seconds=draw.uniform(0, until_first))
        else:
            until_first = readers.start_and_kill(**job, first_step=True, seconds=draw.uniform(0, 0.1))
        before, steps = steps, saved_steps(tmp_path)
        assert steps >= before
        without_a_step += steps == before
        within_a_step += read_log(log_file(tmp_path, 0), steps + 1) != read_log(log_file(tmp_path, 0), steps)

    assert without_a_step > 3, "no kill came at the start"
    assert within_a_step > 3, "no kill came within a step"
    assert steps > reader(shards, access).loaders.sizes["train"] // BATCH, "less than an epoch was read"
    whole = references[access].steps(steps)
    local = BATCH // ranks
    for rank in range(ranks):
        lines, _ = read_log(log_file(tmp_path, rank), steps)
        assert lines == [
            (step, level, batch[rank * local : (rank + 1) * local])
            for step, batches in enumerate(whole)
            for level, batch in batches.items()
        ]


def saved_steps(folder: Path) -> int:
    file = read_keys.state_file(folder)
    return int(json.loads(file.read_text())["step"]) if file.exists() else 0


def together(ranks: list[KeyReader], step: int) -> dict[str, Rows]:
    """The global batches of a step, of which every rank reads an equal share."""
    shares = [rank.step(step) for rank in ranks]
    assert all(len(rows) == BATCH // len(ranks) for share in shares for rows in share.values())
    return {level: [row for share in shares for row in share[level]] for level in shares[0]}


def keys_of(rows: Rows) -> list[str]:
    return [row.split()[0] for row in rows]


@pytest.mark.parametrize("access", ACCESSES)
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_read_together_what_one_reads(
    access: str, world_size: int, shards: Path, references: dict[str, Reference]
) -> None:
    ranks = [reader(shards, access, rank, world_size) for rank in range(world_size)]
    for step, whole in enumerate(references[access].steps(40)):
        assert together(ranks, step) == whole


@pytest.mark.parametrize("access", ACCESSES)
def test_the_number_of_ranks_may_change_at_a_restart(
    access: str, shards: Path, references: dict[str, Reference]
) -> None:
    state = reader(shards, access).state_dict()
    for step, whole in enumerate(references[access].steps(40)):
        if step % 5 == 0:
            world_size = (1, 2, 4)[step // 5 % 3]
            ranks = [reader(shards, access, rank, world_size) for rank in range(world_size)]
            for rank in ranks:
                rank.load_state_dict(state)
        assert together(ranks, step) == whole
        state = ranks[-1].state_dict()


def test_other_images_are_noticed(fill_images: Callable[..., Path], tmp_path: Path) -> None:
    """A file more is another order of all: what was seen and what is held out would change without a word."""
    folder = fill_images(mode="L")
    fields = {"data.dataset": "folder", "data.path": folder, "run_dir": tmp_path / "run", "iterations": 2}
    train(tiny_config(fields))
    (tmp_path / "run" / "result.json").unlink(missing_ok=True)
    elsewhere = shutil.copytree(folder, tmp_path / "moved")
    assert train(tiny_config({**fields, "data.path": elsewhere})).iteration == 2
    shutil.copy(elsewhere / "class0" / "0000.png", elsewhere / "class0" / "more.png")
    with pytest.raises(UserError, match=r"^data\.path: the \w+ level has read other images so far"):
        train(tiny_config({**fields, "data.path": elsewhere}))


@pytest.mark.parametrize("access", ACCESSES)
@pytest.mark.parametrize(("level", "part"), [("pretrain", "train"), ("head", "train"), ("mask", "heldout")])
def test_an_epoch_has_every_sample_once_but_a_rest(
    access: str, level: str, part: Part, good_shards: Path
) -> None:
    source = reader(good_shards, access, augment="none")
    members = source.all_of(part)
    assert len(set(keys_of(members))) == len(members) == source.loaders.sizes[part]
    batches, rest = divmod(len(members), BATCH)
    epochs = [[row for _ in range(batches) for row in source.next(level)] for _ in range(4)]

    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == len(members) - rest
        assert set(epoch) <= set(members)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs), "the order is the same"
    if rest:
        assert len({frozenset(epoch) for epoch in epochs}) > 1, "always the same samples are left out"
    assert all(same_sample(row) for row in members if row.split()[0][-1] in "13579")


def same_sample(row: str) -> bool:
    """Whether label and pixels are those of the sample that the key names, a PNG."""
    key, found_label, checksum = row.split()
    number = int(key[-5:])
    expected = pixels(number).transpose(2, 0, 1).tobytes()
    return (found_label.encode(), checksum) == (label(number), f"{crc32(expected):08x}")


@pytest.mark.parametrize("access", ACCESSES)
@pytest.mark.parametrize(("world_size", "workers"), [(1, 2), (2, 0), (2, 2)])
def test_nobody_reads_what_another_one_uses(
    access: str,
    world_size: int,
    workers: int,
    good_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = FileReader.content

    def noting(self: FileReader, index: int) -> bytes:
        with (tmp_path / str(os.getpid())).open("a") as file:  # a loader process inherits this
            file.write(f"{index}\n")
        return content(self, index)

    monkeypatch.setattr(FileReader, "content", noting)
    ranks = [reader(good_shards, access, rank, world_size, workers) for rank in range(world_size)]
    # No further than what is read ahead stays within the epoch.
    used = [row for _ in range(5) for rank in ranks for row in rank.next("pretrain")]
    for rank in ranks:
        rank.close()

    read = [int(line) for file in tmp_path.iterdir() for line in file.read_text().splitlines()]
    assert len(used) == len(set(used)) == 5 * BATCH
    assert len(read) == len(set(read)) >= len(used)
    assert len(list(tmp_path.iterdir())) == max(1, world_size * workers)
