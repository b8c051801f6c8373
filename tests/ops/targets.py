"""The implementations under test, each on the devices where it can run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import mlomae_kernels as ops
from mlomae_kernels.dispatch import fast_implementation

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Target:
    """An implementation (see ``mlomae_kernels.dispatch``) on a device."""

    choice: str
    device: str

    @contextmanager
    def use(self) -> Iterator[None]:
        """Makes the operators use it; skips the test, with the reason, where it cannot be had."""
        with ops.implementation(self.choice):
            try:
                fast_implementation("select_patches", self.device)
            except RuntimeError as error:
                if os.environ.get("MLOMAE_REQUIRE_NATIVE") == "1" and not torch.cuda.is_available():
                    pytest.fail(f"MLOMAE_REQUIRE_NATIVE=1, but: {error}")
                pytest.skip(str(error))
            yield

    def rounds_down(self, dtype: torch.dtype) -> bool:
        """Triton's interpreter cuts the bits off that bfloat16 has no room for, a GPU rounds."""
        return self.choice == "triton" and self.device == "cpu" and dtype == torch.bfloat16


REFERENCE = Target("reference", "cpu")
NATIVE = Target("native", "cpu")

each_target = pytest.mark.parametrize(
    "target",
    [
        pytest.param(REFERENCE, id="reference"),
        pytest.param(NATIVE, id="native"),
        pytest.param(Target("triton", "cpu"), id="triton-interpreted"),
        pytest.param(Target("triton", "cuda"), id="triton-cuda", marks=pytest.mark.gpu),
        pytest.param(Target("native", "cuda"), id="native-cuda", marks=pytest.mark.gpu),
    ],
)


LAYOUTS = ("contiguous", "transposed", "every second", "expanded")


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values [B, …] (for ``expanded``: those of the first row in all rows) with other strides."""
    if layout == "transposed":
        axes = tuple(reversed(range(tensor.dim())))
        return tensor.permute(axes).contiguous().permute(axes)
    if layout == "every second":
        wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"), dtype=tensor.dtype)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    return tensor


def assert_sums(actual: Tensor, terms: Tensor, target: Target) -> None:
    """``actual`` is ``terms`` summed over dim 0: within 1e-6 of the sum of their sizes, then rounded once."""
    exact, sizes = terms.double().sum(0), terms.double().abs().sum(0)
    resolution = torch.finfo(actual.dtype).eps * (2 if target.rounds_down(actual.dtype) else 1)
    bound = 1e-6 * sizes + (resolution * exact.abs() if actual.dtype != torch.float64 else 0)
    assert ((actual.cpu().double() - exact).abs() <= bound + torch.finfo(actual.dtype).tiny).all()


def assert_rounded(actual: Tensor, exact: Tensor, target: Target) -> None:
    """``actual`` is the float64 tensor ``exact`` rounded to its dtype, to within one unit in the last place
    where the target does not round to nearest.
    """
    expected = exact.to(actual.dtype)
    if target.rounds_down(actual.dtype):
        spacing = torch.finfo(actual.dtype).eps * exact.abs()
        assert ((actual.double() - exact).abs() <= spacing).all()
    else:
        assert torch.equal(actual.cpu(), expected)
