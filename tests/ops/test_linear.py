"""``linear`` with oneDNN's products against torch's own, on every processor that oneDNN runs on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import mlomae_kernels
from mlomae_kernels.ops import linear as module


@pytest.fixture(autouse=True)
def one_dnn(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    monkeypatch.setattr(module, "one_dnn_pays", lambda: True)


class Products(TorchDispatchMode):
    """Counts oneDNN's products and torch's."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def inputs(*shape: int, out: int, bias: bool = True, grad: bool = True) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).requires_grad_(grad)

    return [random(*shape), random(out, shape[-1]), random(out) if bias else None]


CASES = [
    ((8, 50, 96), 288, True),
    ((8, 50, 288), 96, True),
    ((300, 64), 64, False),
    ((4, 7, 33, 65), 129, True),
]


@pytest.mark.parametrize(("shape", "out", "bias"), CASES)
def test_result_and_gradients_are_right_to_rounding(shape: tuple[int, ...], out: int, bias: bool) -> None:
    arguments = inputs(*shape, out=out, bias=bias)
    leaves = [a for a in arguments if a is not None]
    cotangent = torch.randn(*shape[:-1], out).transpose(0, 1).contiguous().transpose(0, 1)
    with Products() as products:
        result = mlomae_kernels.linear(*arguments)  # type: ignore[arg-type]
        grads = torch.autograd.grad(result, leaves, cotangent)
    assert "_linear_pointwise" in products.names and "addmm" not in products.names
    wide = [None if a is None else a.detach().double().requires_grad_() for a in arguments]
    expected = F.linear(*wide)  # type: ignore[arg-type]
    wanted = torch.autograd.grad(expected, [a for a in wide if a is not None], cotangent.double())
    for got, want in zip([result, *grads], [expected, *wanted], strict=True):
        assert got.shape == want.shape and got.dtype == torch.float32
        torch.testing.assert_close(
            got.double(), want, rtol=1e-5, atol=1e-5 * float(want.detach().abs().max())
        )


def test_gradients_that_nobody_needs_are_not_computed() -> None:
    x, weight, bias = inputs(300, 96, out=288)
    assert x is not None
    with Products() as products:
        result = mlomae_kernels.linear(x.detach(), weight, bias)  # type: ignore[arg-type]
        result.sum().backward()
    assert products.names.count("_linear_pointwise") + products.names.count("mm") == 2
    assert x.grad is None


def test_second_derivatives_and_tangents_are_those_of_torch() -> None:
    def loss(linear, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return linear(x, weight, bias).tanh().pow(2).sum()

    x, weight, bias = inputs(300, 64, out=64, grad=False)
    v = torch.randn(64, 64)
    found = []
    for linear in (mlomae_kernels.linear, F.linear):
        leaf = weight.clone().requires_grad_()  # type: ignore[union-attr]
        (grad,) = torch.autograd.grad(loss(linear, x, leaf, bias), leaf, create_graph=True)  # type: ignore[arg-type]
        (second,) = torch.autograd.grad((grad * v).sum(), leaf)
        tangent = torch.func.jvp(lambda w, linear=linear: loss(linear, x, w, bias), (weight,), (v,))[1]  # type: ignore[arg-type]
        found.append((second, tangent))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-3)


def test_other_dtypes_small_results_autocast_and_compiled_code_take_torch() -> None:
    x, weight, bias = inputs(300, 64, out=64, grad=False)
    assert x is not None and weight is not None and bias is not None

    def uses_one_dnn(*arguments: Tensor) -> bool:
        with Products() as products:
            mlomae_kernels.linear(*arguments)
        return "_linear_pointwise" in products.names

    assert uses_one_dnn(x, weight, bias)
    assert not uses_one_dnn(x.double(), weight.double(), bias.double())
    assert not uses_one_dnn(x[:2], weight, bias)
    with torch.autocast("cpu", torch.bfloat16):
        assert not uses_one_dnn(x, weight, bias)
        assert mlomae_kernels.linear(x, weight, bias).dtype == torch.bfloat16
