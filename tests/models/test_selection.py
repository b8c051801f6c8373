"""Mask policies: exact counts, the law of each policy, and independence of the number of ranks."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage, stats  # type: ignore[import-untyped]  # scipy has no types
from torch import Tensor

from mlomae.models.selection import NUM_BLOCKS, MaskPolicy, PatchSelection
from mlomae.sections import MaskingConfig

CPU = torch.device("cpu")
POLICIES = ("learned", "random", "fixed", "weighted-random", "block", "hard")


def _policy(
    policy: str = "learned", grid: tuple[int, int] = (4, 6), keep: int = 7, seed: int = 0, **fields: Any
) -> MaskPolicy:
    return MaskPolicy(MaskingConfig.model_validate({"policy": policy, **fields}), grid, keep, seed)


def _select(policy: MaskPolicy, batch: int = 16, step: int = 3, first_row: int = 0) -> PatchSelection:
    """With scores that depend on the row of the global batch only."""
    patches = policy.grid[0] * policy.grid[1]
    scores = torch.randn(64, patches, generator=torch.Generator().manual_seed(1))[
        first_row : first_row + batch
    ]
    return policy.select(scores, batch, step, first_row, CPU)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("grid", "keep"), [((4, 6), 7), ((3, 5), 1), ((5, 3), 14), ((1, 2), 1), ((16, 16), 64)]
)
def test_every_policy_keeps_the_exact_number_of_patches(
    policy: str, grid: tuple[int, int], keep: int
) -> None:
    selection = _select(_policy(policy, grid, keep))
    patches = grid[0] * grid[1]
    assert selection.ids_keep.shape == (16, keep)
    assert torch.equal(selection.mask.sum(dim=1), torch.full((16,), float(patches - keep)))
    assert not selection.mask.gather(1, selection.ids_keep).any()
    assert torch.equal(selection.ids_restore.sort(dim=1).values, torch.arange(patches).expand(16, -1))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_can_be_replayed_and_another_differs(policy: str) -> None:
    masks = [_select(_policy(policy), step=step).mask for step in (3, 3, 4)]
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2]) == (policy == "fixed")


@pytest.mark.parametrize("policy", POLICIES)
def test_another_seed_differs(policy: str) -> None:
    first, second = (_select(_policy(policy, seed=seed)).mask for seed in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("policy", POLICIES)
def test_ranks_together_select_what_one_rank_does(policy: str) -> None:
    chosen = _policy(policy, random_share=0.5)
    whole = _select(chosen, 16)
    halves = [_select(chosen, 8, first_row=row) for row in (0, 8)]
    assert torch.equal(torch.cat([half.ids_keep for half in halves]), whole.ids_keep)
    assert torch.equal(torch.cat([half.mask for half in halves]), whole.mask)


def test_learned_topk_keeps_the_lowest_scores() -> None:
    scores = torch.randn(8, 24)
    selection = _policy(selection="topk", random_share=0.0).select(scores, 8, 0, 0, CPU)
    expected = (scores > scores.sort(dim=1).values[:, 6:7]).float()
    assert torch.equal(selection.mask, expected)


def test_selection_carries_no_gradient() -> None:
    scores = torch.randn(8, 24, requires_grad=True)
    assert not _policy().select(scores, 8, 0, 0, CPU).mask.requires_grad


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_gumbel_removes_by_the_law_of_sampling_without_replacement(temperature: float) -> None:
    """Two of four are removed, one after the other, with chances proportional to exp(score / temperature)."""
    scores = torch.tensor([-1.0, 0.0, 0.5, 1.2])
    draws = 20_000
    policy = _policy(grid=(2, 2), keep=2, temperature=temperature, random_share=0.0)
    mask = policy.select(scores.expand(draws, -1), draws, 0, 0, CPU).mask
    weights = (scores / temperature).double().softmax(0).tolist()
    pairs = list(combinations(range(4), 2))
    chances = [
        weights[i] * weights[j] / (1 - weights[i]) + weights[j] * weights[i] / (1 - weights[j])
        for i, j in pairs
    ]
    counts = [int((mask[:, i] * mask[:, j]).sum()) for i, j in pairs]
    assert sum(counts) == draws
    assert stats.chisquare(counts, [chance * draws for chance in chances]).pvalue > 0.01


def test_gumbel_at_low_temperature_is_topk() -> None:
    cold, sharp = _policy(temperature=1e-4, random_share=0.0), _policy(selection="topk", random_share=0.0)
    assert torch.equal(_select(cold).mask, _select(sharp).mask)


def test_random_share_is_the_share_of_images_with_a_random_mask() -> None:
    rows, grid = 4000, (4, 6)
    scores = torch.arange(24.0).expand(rows, -1)

    def masks(share: float, step: int = 0) -> Tensor:
        policy = _policy(selection="topk", grid=grid, random_share=share)
        return policy.select(scores, rows, step, 0, CPU).mask

    learned, mixed = masks(0.0), masks(0.3)
    drawn = _policy("random", grid).select(None, rows, 0, 0, CPU).mask
    is_learned = (mixed == learned).all(dim=1)
    assert is_learned.float().mean().item() == pytest.approx(0.7, abs=0.02)
    assert torch.equal(mixed[~is_learned], drawn[~is_learned])
    assert torch.equal(masks(1.0), drawn)
    # Other images at another step.
    later = (masks(0.3, step=1) == learned).all(dim=1)
    assert (later & ~is_learned).any() and (~later & is_learned).any()


def test_random_removes_every_position_equally_often() -> None:
    mask = _policy("random").select(None, 20_000, 0, 0, CPU).mask
    counts = mask.sum(dim=0).numpy()
    # The positions of one image exclude each other: the statistic shrinks by (L - 1) / L.
    assert stats.chisquare(counts).statistic < stats.chi2(23).ppf(0.99)
    assert stats.chisquare(counts).statistic > 0


def test_fixed_is_one_mask_for_all_images_and_steps() -> None:
    policy = _policy("fixed")
    masks = torch.cat([_select(policy, step=step).mask for step in range(3)])
    assert (masks == masks[0]).all()


def test_weighted_random_selects_like_random() -> None:
    weighted, plain = _policy("weighted-random"), _policy("random")
    scores = torch.randn(16, 24)
    expected = plain.select(None, 16, 5, 0, CPU)
    assert torch.equal(weighted.select(scores, 16, 5, 0, CPU).mask, expected.mask)
    assert torch.equal(weighted.select(-scores, 16, 5, 0, CPU).mask, expected.mask)


@pytest.mark.parametrize(
    ("grid", "keep"), [((16, 16), 64), ((14, 14), 49), ((4, 4), 8), ((7, 3), 5), ((2, 12), 18)]
)
def test_block_removes_a_few_contiguous_regions(grid: tuple[int, int], keep: int) -> None:
    """Contiguous by sides or corners (8-connectivity); at most ``NUM_BLOCKS`` regions in an image."""
    mask = _policy("block", grid, keep).select(None, 200, 0, 0, CPU).mask.view(-1, *grid).numpy()
    regions = [ndimage.label(image, structure=np.ones((3, 3)))[1] for image in mask]
    assert set(regions) <= set(range(1, NUM_BLOCKS + 1))
    # A random mask of the same ratio has fewer equal neighbours.
    drawn = _policy("random", grid, keep).select(None, 200, 0, 0, CPU).mask.view(-1, *grid).numpy()
    assert _equal_neighbours(mask) > _equal_neighbours(drawn) + 0.1


def _equal_neighbours(mask: np.ndarray) -> float:
    down, across = mask[:, 1:] == mask[:, :-1], mask[:, :, 1:] == mask[:, :, :-1]
    return float(np.concatenate([down.ravel(), across.ravel()]).mean())


def test_blocks_lie_elsewhere_in_every_image() -> None:
    mask = _policy("block", (8, 8), 32).select(None, 400, 0, 0, CPU).mask
    frequency = mask.mean(dim=0)
    assert len(mask.unique(dim=0)) > 350
    assert frequency.min() > 0.2 and frequency.max() < 0.8


def test_hard_masks_are_random_at_first_and_hold_their_share_of_the_hardest_at_the_end() -> None:
    batch, patches, keep, steps = 32, 24, 8, 11
    scores = torch.randn(batch, patches, generator=torch.Generator().manual_seed(2))
    config = MaskingConfig.model_validate({"policy": "hard", "hard_share": 0.75})
    policy = MaskPolicy(config, (4, 6), keep, 0, num_steps=steps)
    random = MaskPolicy(MaskingConfig.model_validate({"policy": "random"}), (4, 6), keep, 0)
    order = scores.argsort(dim=1, descending=True)

    def mask(step: int) -> Tensor:
        return policy.select(scores, batch, step, 0, CPU).mask

    assert torch.equal(mask(0), random.select(None, batch, 0, 0, CPU).mask)
    for step, num_hard in ((5, 6), (10, 12), (99, 12)):  # of 16 removed: 0.75 * 5/10, 0.75, and no more
        found = mask(step)
        assert found.gather(1, order[:, :num_hard]).all()
        # The others are drawn from all other patches alike: no rank is preferred, none is left out.
        rest = found.gather(1, order[:, num_hard:]).mean(dim=0)
        expected = (16 - num_hard) / (patches - num_hard)
        assert rest.mean().item() == pytest.approx(expected)
        assert (rest - expected).abs().max() < 4.5 * (expected * (1 - expected) / batch) ** 0.5
