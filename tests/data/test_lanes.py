from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mlomae.data.batches import Order
from mlomae.data.lanes import LaneBatches, count_lanes
from mlomae.data.shards.scan import scan
from mlomae.data.shards.source import ShardSource
from mlomae.data.subset import Subset

SIZES = (7, 12, 3, 9, 10)  # samples per shard: 41


@pytest.fixture
def source(tmp_path: Path, fill_shard: Callable[..., None]) -> ShardSource:
    for number, size in enumerate(SIZES):
        fill_shard(tmp_path / f"train-{number}.tar", size, first_seed=20 * number)
    return ShardSource(scan([str(tmp_path / f"train-{number}.tar") for number in range(len(SIZES))]))


def batches(
    source: ShardSource, batch: int, lanes: int, buffer: int = 8, rank: int = 0, ranks: int = 1
) -> LaneBatches:
    subset = Subset(source, torch.arange(len(source)), (8, 8), (0.5,) * 3, (0.5,) * 3)
    local = batch // ranks
    return LaneBatches(
        subset, "none", Order((0, "pretrain", "order"), 1, batch, local, rank * local), lanes, buffer
    )


def read(some: LaneBatches, first: int, count: int, workers: int = 0) -> list[list[int]]:
    stream = some.iterate(first, workers)
    rows = [next(stream).indices.tolist() for _ in range(count)]
    stream.close()
    return rows


@pytest.mark.parametrize(
    "batch, ranks, shards, expected",
    [
        (256, 1, 1000, 32),
        (256, 8, 1000, 32),  # the same as for one rank
        (256, 64, 1000, 64),
        (96, 3, 1000, 24),
        (96, 1, 5, 4),  # more lanes than shards would read shards twice
        (7, 1, 1000, 7),
        (64, 4, 1, 4),  # but every rank needs one
    ],
)
def test_lanes_divide_the_batch_and_are_shared_by_the_ranks(
    batch: int, ranks: int, shards: int, expected: int
) -> None:
    assert count_lanes(batch, ranks, shards) == expected


@pytest.mark.parametrize("batch, lanes", [(4, 1), (6, 3), (10, 5), (8, 2)])
@pytest.mark.parametrize("buffer", [1, 12, 1000])
def test_an_epoch_takes_every_sample_once_but_for_the_rest(
    source: ShardSource, batch: int, lanes: int, buffer: int
) -> None:
    some = batches(source, batch, lanes, buffer)
    per_epoch = some.length // some.rows
    assert 0 <= len(source) - per_epoch * batch < batch + lanes * some.rows
    epochs = [read(some, epoch * per_epoch, per_epoch) for epoch in range(3)]
    for rows in epochs:
        flat = [index for batch_rows in rows for index in batch_rows]
        assert all(len(batch_rows) == batch for batch_rows in rows)
        assert len(set(flat)) == len(flat) == per_epoch * batch
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_lane_reads_neighbours_in_a_shuffled_order(source: ShardSource) -> None:
    some = batches(source, 4, 2, buffer=16)
    rows = read(some, 0, 4)
    for lane in (slice(0, 2), slice(2, 4)):
        block = [index for batch_rows in rows for index in batch_rows[lane]]
        shards = source.index.samples.shards[block].tolist()
        assert len(set(shards)) <= 3  # consecutive samples of a few shards
        assert block != sorted(block)


@pytest.mark.parametrize("first", [0, 1, 5, 6, 13])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_any_position_can_be_entered_with_any_number_of_workers(
    source: ShardSource, first: int, workers: int
) -> None:
    some = batches(source, 6, 3)
    assert read(some, first, 4, workers) == read(some, 0, first + 4)[first:]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_batches_of_one_and_no_lane(source: ShardSource, ranks: int) -> None:
    whole = read(batches(source, 8, 4), 0, 7)
    shares = [read(batches(source, 8, 4, rank=rank, ranks=ranks), 0, 7) for rank in range(ranks)]
    assert [[index for part in parts for index in part] for parts in zip(*shares, strict=True)] == whole
    per_epoch = batches(source, 8, 4).length // 2
    owners = [{index for rows in share[:per_epoch] for index in rows} for share in shares]
    assert sum(map(len, owners)) == len(set().union(*owners))


def test_a_bad_sample_is_replaced_within_its_block(source: ShardSource, tmp_path: Path) -> None:
    some = batches(source, 4, 2, buffer=16)
    good = read(some, 0, 4)
    victim = good[1][3]
    shard, offset = (
        int(column[victim]) for column in (source.index.samples.shards, source.index.samples.offsets)
    )
    with (tmp_path / f"train-{shard}.tar").open("r+b") as file:
        file.seek(offset)
        file.write(b"ruined")
    stream = batches(source, 4, 2, buffer=16).iterate(0, 0)
    parts = [next(stream) for _ in range(4)]
    found = [part.indices.tolist() for part in parts]
    assert [fault.key for part in parts for fault in part.faults] == [source.keys[victim]]
    block = [index for rows in good for index in rows[2:]]
    expected = block[(block.index(victim) + 1) % len(block)]
    assert found == [[expected if index == victim else index for index in rows] for rows in good]
    assert max(Counter(index for rows in found for index in rows).values()) == 2
