"""The operators as torch sees them: schema, tracing, derivatives, transforms, autocast, compilation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

import mlomae_kernels as ops
from tests.ops.targets import NATIVE, REFERENCE, Target

NAMES = (
    "select_patches",
    "patch_gather",
    "patch_gather_backward",
    "patch_scatter",
    "patch_scatter_backward",
    "masked_patch_loss",
    "masked_patch_loss_backward",
)
_cpu_targets = pytest.mark.parametrize("target", [REFERENCE, NATIVE], ids=["reference", "native"])


def _samples(name: str) -> list[tuple[Any, ...]]:
    """Arguments with and without the optional ones; floating tensors require gradients."""
    torch.manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, requires_grad=True)

    ids_keep, ids_restore, mask = ops.select_patches(torch.rand(2, 6), 2)
    images = torch.randn(2, 3, 4, 6)
    return {
        "select_patches": [(leaf(2, 6), 2)],
        "patch_gather": [
            (leaf(2, 6, 5), leaf(1, 6, 5), ids_keep, leaf(1, 1, 5)),
            (leaf(2, 6, 5), None, ids_keep, None),
        ],
        "patch_gather_backward": [
            (leaf(2, 3, 5), ids_keep, 6, True, True),
            (leaf(2, 2, 5), ids_keep, 6, False, False),
        ],
        "patch_scatter": [(leaf(2, 3, 5), leaf(1, 1, 5), ids_restore, leaf(1, 7, 5))],
        "patch_scatter_backward": [(leaf(2, 7, 5), ids_restore, 2, need) for need in (True, False)],
        "masked_patch_loss": [
            (leaf(2, 6, 12), images, mask, leaf(2, 6), 2, True),
            (leaf(2, 6, 12), images, mask, None, 2, False),
            (leaf(2, 4, 12), images, ids_restore[:, :4], None, 2, True),
        ],
        "masked_patch_loss_backward": [
            (leaf(2, 6), leaf(2, 6, 12), images, mask, leaf(2, 6), 2, True),
            (leaf(2, 6), leaf(2, 6, 12), images, mask, None, 2, False),
        ],
    }[name]


@_cpu_targets
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(target: Target, name: str) -> None:
    with target.use():
        for sample in _samples(name):
            torch.library.opcheck(getattr(torch.ops.mlomae, name).default, sample)


def _floating(values: Any) -> list[Tensor]:
    values = values if isinstance(values, tuple | list) else [values]
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.numel()]


@_cpu_targets
@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("backward")])
def test_compiles_in_one_graph_and_only_once(target: Target, name: str) -> None:
    op = getattr(torch.ops.mlomae, name)
    torch.compiler.reset()
    compiled = torch.compile(lambda *args: op(*args), fullgraph=True, backend="aot_eager")
    with target.use():
        for sample in _samples(name):
            eager, traced = op(*sample), compiled(*sample)
            for got, want in zip(_floating(traced), _floating(eager), strict=True):
                assert torch.equal(got, want)
            leaves = [] if name == "select_patches" else [t for t in _floating(sample) if t.requires_grad]
            for got, want in zip(
                torch.autograd.grad(traced.sin().sum(), leaves) if leaves else (),
                torch.autograd.grad(eager.sin().sum(), leaves) if leaves else (),
                strict=True,
            ):
                assert torch.equal(got, want)
        with torch.compiler.set_stance("fail_on_recompile"):
            compiled(*_samples(name)[-1])


@pytest.mark.slow
def test_the_default_compiler_traces_through_all_of_them() -> None:
    tokens, images = torch.randn(2, 6, 12, requires_grad=True), torch.randn(2, 3, 4, 6)
    token, pos = torch.randn(1, 1, 12), torch.randn(1, 7, 12)

    def step(tokens: Tensor, scores: Tensor) -> Tensor:
        ids_keep, ids_restore, mask = ops.select_patches(scores, 2)
        visible = ops.patch_gather(tokens, pos[:, 1:], ids_keep, token).sin()
        full = ops.patch_scatter(visible, token, ids_restore, pos)
        return ops.masked_patch_loss(full[:, 1:], images, mask, patch_size=2, norm_pix=True).sum()

    scores = torch.rand(2, 6)
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True)
    (expected,) = torch.autograd.grad(step(tokens, scores), tokens)
    (actual,) = torch.autograd.grad(compiled(tokens, scores), tokens)
    torch.testing.assert_close(actual, expected)


def _linear_in_first(name: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    sample = _samples(name)[0]
    op = getattr(torch.ops.mlomae, name)

    def total(first: Tensor) -> Tensor:
        rest = (v.detach() if isinstance(v, Tensor) else v for v in sample[1:])
        results = op(first, *rest)
        results = results if isinstance(results, tuple) else (results,)
        return torch.stack([r.sin().sum() for r in results]).sum()

    return total, sample[0].detach()


@_cpu_targets
@pytest.mark.parametrize("name", [name for name in NAMES if name != "select_patches"])
def test_forward_and_reverse_mode_agree_and_nest(target: Target, name: str) -> None:
    with target.use():
        total, x = _linear_in_first(name)
        tangent = torch.randn_like(x)
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(total(leaf), leaf)
        torch.testing.assert_close(torch.func.grad(total)(x), gradient)
        value, derivative = torch.func.jvp(total, (x,), (tangent,))
        torch.testing.assert_close(value, total(x))
        torch.testing.assert_close(derivative, (gradient * tangent).sum())
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(total(forward_ad.make_dual(x, tangent)))
        torch.testing.assert_close(dual.tangent, derivative)
        # Forward over reverse, against double backward through the registered operators.
        curvature = torch.func.jvp(torch.func.grad(total), (x,), (tangent,))[1]
        (once,) = torch.autograd.grad(total(leaf), leaf, create_graph=True)
        (twice,) = torch.autograd.grad((once * tangent).sum(), leaf)
        torch.testing.assert_close(curvature, twice)
        assert twice.abs().max() > 0


@_cpu_targets
@pytest.mark.parametrize("name", NAMES)
def test_vmap_is_a_loop(target: Target, name: str) -> None:
    sample = [v.detach() if isinstance(v, Tensor) else v for v in _samples(name)[0]]
    op = getattr(torch.ops.mlomae, name)
    stacked = torch.stack([sample[0], 2 * sample[0], -sample[0]])
    with target.use():
        mapped = torch.vmap(lambda first: op(first, *sample[1:]))(stacked)
        looped = [op(first, *sample[1:]) for first in stacked]
    if isinstance(mapped, Tensor):
        mapped, looped = (mapped,), [(one,) for one in looped]
    for got, want in zip(mapped, zip(*looped, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(want))


@_cpu_targets
def test_autocast_takes_the_widest_dtype(target: Target) -> None:
    ids_keep, ids_restore, _ = ops.select_patches(torch.rand(2, 6), 2)
    tokens = torch.randn(2, 6, 5, dtype=torch.bfloat16, requires_grad=True)
    pos, token = torch.randn(1, 6, 5), torch.randn(1, 1, 5)
    with target.use():
        with pytest.raises(ValueError, match=r"patch_gather: pos_embed: got torch.float32, expected"):
            ops.patch_gather(tokens, pos, ids_keep, token)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            visible = ops.patch_gather(tokens, pos, ids_keep, token)
            full = ops.patch_scatter(visible.bfloat16(), token, ids_restore, torch.randn(1, 7, 5))
            assert torch.is_autocast_enabled("cpu")
        assert visible.dtype == full.dtype == torch.float32
        assert torch.equal(visible, ops.patch_gather(tokens.float(), pos, ids_keep, token))
        full.sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.dtype == torch.bfloat16


def test_second_derivatives_survive_in_a_mixed_graph() -> None:
    # The operator beside plain torch: a backward without formula would drop its term without a word.
    ids_restore = ops.select_patches(torch.rand(1, 4), 2)[1]
    latent = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
    token, pos = torch.zeros(1, 1, 2, dtype=torch.float64), torch.zeros(1, 5, 2, dtype=torch.float64)
    value = ops.patch_scatter(latent, token, ids_restore, pos).pow(3).sum() + latent.pow(4).sum()
    (once,) = torch.autograd.grad(value, latent, create_graph=True)
    (twice,) = torch.autograd.grad(once.sum(), latent)
    torch.testing.assert_close(twice, 6 * latent + 12 * latent**2)


def test_offsets_reach_beyond_two_to_the_31() -> None:
    # Pages that nobody touches cost nothing: 6 GB of address space, a few kilobytes of memory.
    for target in (NATIVE, Target("triton", "cpu")):
        tokens = torch.empty_strided((3, 4, 8), (2**30 + 16, 8, 1), dtype=torch.bfloat16)
        tokens.copy_(torch.randn(3, 4, 8))
        ids = torch.tensor([[1, 3]]).expand(3, 2)
        with target.use():
            assert torch.equal(ops.patch_gather(tokens, None, ids, None), tokens[:, [1, 3]])
