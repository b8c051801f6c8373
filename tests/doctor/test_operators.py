"""Operators that are right, wrong, broken or not here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mlomae_kernels
from mlomae.doctor.checks import Result, carry_out
from mlomae.doctor.operators import PROVIDERS, calls, error, operator_checks
from mlomae_kernels._native import native_status

NAMES = ["select_patches", "patch_gather", "patch_scatter", "masked_patch_loss"]


def result(name: str) -> Result:
    (check,) = (check for check in operator_checks() if check.name == name)
    return carry_out(check)


def test_every_provider_here_is_right() -> None:
    results = [carry_out(check) for check in operator_checks()]

    assert [entry for entry in results if entry.status == "problem"] == []
    by_name = {entry.name: entry for entry in results}
    right = f"{', '.join(NAMES)}: as plain PyTorch in float64"
    assert by_name["plain PyTorch, cpu"].found == right
    # tests/conftest.py has Triton's interpreter at work where there is no GPU.
    expected = "absent" if torch.cuda.is_available() else "ok"
    assert by_name["Triton, cpu"].status == expected
    assert by_name["native C++, cpu"].status == ("ok" if native_status().available else "absent")
    assert by_name["linear, cpu"].status == "ok"
    attention = by_name["attention, cpu"].found
    assert (
        attention
        == "fused, reference: as plain PyTorch in float64; auto takes fused: flash-attn does not run on cpu"
    )
    assert by_name["in use, cpu"].found == mlomae_kernels.describe("cpu")


@pytest.mark.gpu
def test_a_gpu_adds_its_providers() -> None:
    names = {check.name for check in operator_checks()}

    assert {f"{name}, cuda" for name in PROVIDERS["cuda"].values()} <= names


@pytest.mark.parametrize("place", range(4))
def test_the_comparison_sees_small_errors_in_results_and_gradients(place: int) -> None:
    call = list(calls("cpu"))[place]
    assert error(call) <= 1

    class Slips(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] * 1.001

    def off(*arguments: Any) -> Any:
        found = call.operator(*arguments)
        return (found[0].roll(1, dims=1), *found[1:]) if isinstance(found, tuple) else found * 1.001

    def slipping(*arguments: Any) -> Any:
        return Slips.apply(call.operator(*arguments))

    assert error(type(call)(call.name, off, call.reference, call.arguments)) > 1
    if call.name != "select_patches":
        assert error(type(call)(call.name, slipping, call.reference, call.arguments)) > 1


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (lambda found: found + 1, " times as far from plain PyTorch as rounding explains"),
        (lambda found: found * torch.nan, "nan times as far from plain PyTorch as rounding explains"),
        (lambda found: found[:, 1:], "RuntimeError: "),
    ],
)
def test_a_wrong_operator_is_named_and_the_others_still_run(
    harm: Callable[[Tensor], Tensor], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = mlomae_kernels.patch_gather
    monkeypatch.setattr(mlomae_kernels, "patch_gather", lambda *arguments: harm(right(*arguments)))

    for name in (
        ("plain PyTorch, cpu", "native C++, cpu") if native_status().available else ("plain PyTorch, cpu",)
    ):
        found = result(name)
        assert (found.status, found.found.partition(": ")[0]) == ("problem", "patch_gather")
        assert text in found.found and "; " not in found.found
        assert found.fix is not None
    assert result("linear, cpu").status == "ok"


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        ("_C.so was not built when the package was installed", "absent"),
        ("_C.so cannot be loaded: undefined symbol (x)", "problem"),
    ],
)
def test_a_library_that_is_broken_is_a_problem_and_one_that_is_not_built_is_none(
    reason: str, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlomae_kernels, "describe", lambda device: f"reference ({reason})")

    found = result("native C++, cpu")
    assert (found.status, found.found) == (status, reason)


def test_a_choice_of_kernels_that_cannot_be_had_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise RuntimeError("select_patches: MLOMAE_KERNELS=triton on cpu: triton is not installed")

    monkeypatch.setattr(mlomae_kernels, "select_patches", refuse)

    assert result("in use, cpu").found.endswith("MLOMAE_KERNELS=triton on cpu: triton is not installed")
    assert result("in use, cpu").fix == "unset MLOMAE_KERNELS"
