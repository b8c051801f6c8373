"""Attention: back ends against the formula in float64, and which one is chosen."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import mlomae_kernels as ops
from mlomae_kernels.ops import attention as module
from tests.tolerances import assert_within

_CPU = torch.device("cpu")


def _by_loop(qkv: Tensor) -> Tensor:
    """One head, one query at a time, in float64."""
    batch, tokens, _, heads, dim = qkv.shape
    result = torch.zeros(batch, tokens, heads, dim, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            query, key, value = qkv[b, :, :, h].double().unbind(1)
            for n in range(tokens):
                weights = torch.exp(key @ query[n] / dim**0.5)
                result[b, n, h] = weights @ value / weights.sum()
    return result


@pytest.mark.parametrize("backend", ["auto", "fused", "reference"])
@pytest.mark.parametrize(("tokens", "heads", "dim"), [(1, 1, 1), (7, 3, 5), (50, 2, 16)])
def test_is_the_formula(backend: str, tokens: int, heads: int, dim: int) -> None:
    qkv = torch.randn(2, tokens, 3, heads, dim)
    actual = ops.attention(qkv, backend)
    assert actual.shape == (2, tokens, heads, dim)
    assert_within("attention", actual, _by_loop(qkv))


@pytest.mark.parametrize("backend", ["fused", "reference"])
def test_bfloat16_costs_no_more_than_its_own_rounding(backend: str) -> None:
    qkv = torch.randn(2, 50, 3, 4, 16).bfloat16()
    exact = _by_loop(qkv)
    query, key, value = qkv.transpose(1, 3).unbind(2)
    naive = ((query @ key.transpose(2, 3) / 4).softmax(3) @ value).transpose(1, 2)
    error = (ops.attention(qkv, backend).double() - exact).abs().max()
    assert error <= 2 * (naive.double() - exact).abs().max()


@pytest.mark.parametrize("backend", ["auto", "fused", "reference"])
def test_gradients_agree_also_from_a_linear_layer_s_output(backend: str) -> None:
    packed = torch.randn(2, 9, 3 * 2 * 4, dtype=torch.float64, requires_grad=True)

    def run(packed: Tensor) -> Tensor:
        return ops.attention(packed.view(2, 9, 3, 2, 4), backend)

    assert gradcheck(run, (packed,))


def test_the_reference_has_every_derivative() -> None:
    qkv = torch.randn(1, 4, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: ops.attention(x, "reference"), (qkv,), check_forward_ad=True)
    assert gradgradcheck(lambda x: ops.attention(x, "reference"), (qkv,))


@pytest.mark.parametrize("backend", ["auto", "fused"])
def test_forward_mode_takes_the_reference(backend: str) -> None:
    qkv, tangent = torch.randn(2, 1, 4, 3, 2, 8, dtype=torch.float64)
    expected = torch.func.jvp(lambda x: ops.attention(x, "reference"), (qkv,), (tangent,))[1]
    actual = torch.func.jvp(lambda x: ops.attention(x, backend), (qkv,), (tangent,))[1]
    assert torch.equal(actual, expected)


def test_fused_attention_refuses_a_double_backward() -> None:
    qkv = torch.randn(1, 4, 3, 2, 8, requires_grad=True)
    (once,) = torch.autograd.grad(ops.attention(qkv, "fused").sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match=r"derivative for .* is not implemented"):
        torch.autograd.grad(once.sum(), qkv)


def test_compiles_in_one_graph() -> None:
    qkv = torch.randn(1, 4, 3, 2, 8)
    compiled = torch.compile(ops.attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(qkv), ops.attention(qkv))


@pytest.mark.parametrize(
    ("qkv", "backend", "message"),
    [
        (torch.zeros(1, 4, 3, 8), "auto", "qkv: got shape [1, 4, 3, 8], expected 5 dimensions"),
        (
            torch.zeros(1, 4, 2, 2, 8),
            "auto",
            "qkv: got shape [1, 4, 2, 2, 8], expected [any, any, 3, any, any]",
        ),
        (torch.zeros(1, 4, 3, 2, 8).int(), "auto", "qkv: got torch.int32, expected a floating dtype"),
        (
            torch.zeros(1, 4, 3, 2, 8),
            "fast",
            "backend: got 'fast', expected one of auto, flash, fused, reference",
        ),
        (
            torch.zeros(1, 4, 3, 2, 8),
            "flash",
            "backend: got flash, expected another one: flash-attn does not run on cpu",
        ),
    ],
)
def test_errors_name_the_argument(qkv: Tensor, backend: str, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        ops.attention(qkv, backend)
    assert str(raised.value) == f"attention: {message}"


def test_the_cpu_takes_fused_attention_and_says_why() -> None:
    choice = module.choose_attention("auto", _CPU, torch.bfloat16, 64)
    assert (choice.name, choice.reason) == ("fused", "flash-attn does not run on cpu")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, types.ModuleType]:
    """Stand-ins for the flash-attn packages, which compute by the formula; a GPU is pretended."""
    module._find_release.cache_clear()
    monkeypatch.setattr(module, "_find_flash", lambda device: module._find_release(9))
    packages = {name: types.ModuleType(name) for name in ("flash_attn", "flash_attn_interface")}
    packed = module._reference
    packages["flash_attn"].flash_attn_qkvpacked_func = packed  # type: ignore[attr-defined]
    packages["flash_attn_interface"].flash_attn_qkvpacked_func = lambda qkv: (packed(qkv), None)  # type: ignore[attr-defined]
    packages["flash_attn.cute"] = types.ModuleType("flash_attn.cute")
    packages["flash_attn.cute"].flash_attn_func = lambda q, k, v: (packed(torch.stack([q, k, v], 2)), None)  # type: ignore[attr-defined]
    for name in packages:
        monkeypatch.setitem(sys.modules, name, None)  # not installed
    yield packages
    module._find_release.cache_clear()


@pytest.mark.parametrize(
    ("present", "chosen"),
    [
        (["flash_attn"], "flash-attn 2"),
        (["flash_attn", "flash_attn.cute"], "flash-attn 4"),
        (["flash_attn", "flash_attn.cute", "flash_attn_interface"], "flash-attn 3"),
        ([], "fused"),
    ],
)
def test_the_best_installed_flash_attention_is_taken(
    installed: dict[str, types.ModuleType], monkeypatch: pytest.MonkeyPatch, present: list[str], chosen: str
) -> None:
    for name in present:
        monkeypatch.setitem(sys.modules, name, installed[name])
    choice = module.choose_attention("auto", _CPU, torch.bfloat16, 64)
    assert choice.name == chosen
    qkv = torch.randn(1, 4, 3, 2, 8).bfloat16()
    torch.testing.assert_close(ops.attention(qkv).double(), _by_loop(qkv), rtol=2e-2, atol=2e-2)


def test_flash_attention_is_not_asked_for_what_it_cannot_do(
    installed: dict[str, types.ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", installed["flash_attn"])
    for dtype, dim in ((torch.float32, 64), (torch.bfloat16, 60), (torch.bfloat16, 512)):
        assert module.choose_attention("flash", _CPU, dtype, dim).name == "fused"


def test_forced_flash_attention_says_what_is_missing(installed: dict[str, types.ModuleType]) -> None:
    with pytest.raises(
        ValueError, match=r"backend: got flash, expected another one: flash-attn 3: .*flash-attn 2: "
    ):
        module.choose_attention("flash", _CPU, torch.bfloat16, 64)
    assert module._find_release(7) == "no flash-attn for compute capability 7"


@pytest.mark.parametrize("present", [[], ["flash_attn"]], ids=["fused", "flash"])
def test_the_choice_is_a_constant_to_the_compiler(
    installed: dict[str, types.ModuleType], monkeypatch: pytest.MonkeyPatch, present: list[str]
) -> None:
    for name in present:
        monkeypatch.setitem(sys.modules, name, installed[name])
    torch._dynamo.reset()
    qkv = torch.randn(2, 5, 3, 2, 8, dtype=torch.bfloat16)
    compiled = torch.compile(module.attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(qkv), module.attention(qkv))
