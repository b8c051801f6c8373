"""Counter-based uniform numbers: a fixed function of their counters, uniform and without pattern."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats  # type: ignore[import-untyped]  # scipy has no types

from mlomae.random import counter_uniform, counter_uniforms, stream_seed

SEED = stream_seed(0, "test")


def test_values_never_change() -> None:
    """Golden: another value here means that resumed runs and published seeds give something else."""
    assert [stream_seed(0, "mask", "noise"), stream_seed(7, "pretrain", "augment"), stream_seed(0)] == [
        375647172, 1837668602, 3000206675,
    ]  # fmt: skip
    # In units of 2**-24, which are exact.
    golden = {
        (375647172, 0, 0, (2, 4)): [
            [6233535, 9862493, 9547843, 1791291],
            [1031225, 8271559, 7490479, 15061339],
        ],
        (0, 0, 0, (1, 4)): [[2834975, 11018061, 10839773, 1910509]],
        (4294967295, 123456, 4000, (1, 4)): [[8838457, 13305737, 1099939, 15621499]],
    }
    for arguments, expected in golden.items():
        assert (counter_uniform(*arguments) * 2**24).long().tolist() == expected


def test_streams_are_told_apart_by_seed_and_by_every_name() -> None:
    names: list[tuple[str | int, ...]] = [(), ("a",), ("b",), ("a", "b"), ("b", "a"), ("a", 1), ("a", 2)]
    seeds = [stream_seed(run, *name) for run in (0, 1) for name in names]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_numbers_lie_strictly_between_zero_and_one() -> None:
    u = counter_uniform(SEED, 0, 0, (2000, 1000))
    assert u.dtype == torch.float32
    assert u.min() > 0 and u.max() < 1
    # What the Gumbel noise makes of the extreme ones stays finite.
    assert (-torch.log(-torch.log(u))).isfinite().all()


@pytest.mark.parametrize("shape", [(500, 256), (100_000, 1), (1, 100_000)])
def test_numbers_are_uniform(shape: tuple[int, int]) -> None:
    u = counter_uniform(SEED, 3, 0, shape).flatten().numpy().astype(np.float64)
    assert stats.kstest(u, "uniform").pvalue > 0.01
    # The low bits as well.
    assert stats.kstest(u * 2**12 % 1, "uniform").pvalue > 0.01


def test_rows_are_those_of_the_global_batch() -> None:
    whole = counter_uniform(SEED, 5, 0, (12, 7))
    assert torch.equal(counter_uniform(SEED, 5, 4, (3, 7)), whole[4:7])
    # Nor does the number of columns change the ones before.
    assert torch.equal(counter_uniform(SEED, 5, 0, (12, 3)), whole[:, :3])


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    first = counter_uniform(SEED, 0, 0, (2, 3))
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(counter_uniform(SEED, 0, 0, (2, 3)), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("along", ["seeds", "steps", "rows", "columns"])
def test_neighbours_are_uncorrelated(along: str) -> None:
    """32 neighbouring streams of 4096 numbers: no pair is correlated beyond chance."""
    count, length = 32, 4096
    if along == "seeds":
        streams = [counter_uniform(seed, 0, 0, (1, length))[0] for seed in range(count)]
    elif along == "steps":
        streams = [counter_uniform(SEED, step, 0, (1, length))[0] for step in range(count)]
    elif along == "rows":
        streams = list(counter_uniform(SEED, 0, 0, (count, length)))
    else:
        streams = list(counter_uniform(SEED, 0, 0, (length, count)).T)
    correlation = np.corrcoef(torch.stack(streams).numpy())
    pairs = correlation[np.triu_indices(count, 1)] * np.sqrt(length)
    # Standard normal under independence; 5 is exceeded by one of 496 pairs in 3000 experiments.
    assert np.abs(pairs).max() < 5
    assert stats.kstest(pairs, "norm").pvalue > 0.01


def test_consecutive_numbers_of_a_row_are_uncorrelated() -> None:
    u = counter_uniform(SEED, 0, 0, (1, 200_000))[0].numpy()
    for lag in (1, 2, 3, 16, 256):
        assert abs(np.corrcoef(u[:-lag], u[lag:])[0, 1]) * np.sqrt(len(u)) < 4


def test_no_row_repeats_a_part_of_another() -> None:
    """Nowhere in a batch of 4096 images does a pair of neighbouring numbers come twice.

    Rows that are shifted copies of each other would repeat hundreds of them; 0.01 are expected by chance.
    """
    for step in range(3):
        bits = (counter_uniform(SEED, step, 0, (4096, 256)) * 2**24).long()
        pairs = (bits[:, :-1] << 24 | bits[:, 1:]).flatten()
        assert len(pairs.unique()) == len(pairs)


def test_steps_do_not_share_rows() -> None:
    """Among the rows of 1000 batches of 256 images hardly any come twice (chance: 8 of 256 000)."""
    rows = torch.cat([counter_uniform(SEED, step, 0, (256, 2)) for step in range(1000)])
    assert len(rows.unique(dim=0)) > len(rows) - 50


def test_consecutive_steps_can_be_drawn_together() -> None:
    together = counter_uniforms(7, 2**32 - 2, 4, 5, (6, 3))
    for number, found in enumerate(together):
        assert torch.equal(found, counter_uniform(7, 2**32 - 2 + number, 5, (6, 3)))
