"""Every operator by everything that computes it here, against plain PyTorch in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from mlomae.doctor.checks import Check, Finding, absent, first_line, ok, problem
from mlomae.doctor.devices import has_gpu

if TYPE_CHECKING:
    from torch import Tensor

GROUP = "operators"
# Names of what computes them on each device, as ``mlomae_kernels.implementation`` takes them.
PROVIDERS = {
    "cpu": {"reference": "plain PyTorch", "native": "native C++", "triton": "Triton"},
    "cuda": {"reference": "plain PyTorch", "native": "CUDA C++", "triton": "Triton"},
}
_BATCH, _ROWS, _WIDTH, _PATCH, _KEEP = 2, 4, 64, 2, 5
_PATCHES = _ROWS**2
# A result's rounding, and the noise of sums in another order; both relative to the largest number.
_ROUNDINGS, _NOISE = 4, 1e-5


@dataclass(frozen=True)
class Call:
    """An operator with small inputs.

    Attributes:
        reference: the same function in plain PyTorch.
        arguments: gradients are compared of those that require them.
    """

    name: str
    operator: Callable[..., Any]
    reference: Callable[..., Any]
    arguments: tuple[Any, ...]


def operator_checks() -> list[Check]:
    avoid = "MLOMAE_KERNELS=reference leaves it out"
    checks = []
    for device in ("cpu", "cuda") if has_gpu() else ("cpu",):
        for provider, name in PROVIDERS[device].items():
            fix = "update torch" if provider == "reference" else avoid
            checks.append(Check(GROUP, f"{name}, {device}", partial(_provider, provider, device), fix))
        checks.append(Check(GROUP, f"linear, {device}", partial(_linear, device), "update torch"))
        checks.append(
            Check(
                GROUP, f"attention, {device}", partial(_attention, device), "use --model.attention reference"
            )
        )
        checks.append(Check(GROUP, f"in use, {device}", partial(_in_use, device), "unset MLOMAE_KERNELS"))
    return checks


def calls(device: str) -> Iterator[Call]:
    """The patch operators, in the precision in which training calls them on the device."""
    import torch

    import mlomae_kernels
    from mlomae_kernels import reference

    draw = _Inputs(device)
    scores = draw(_BATCH, _PATCHES, dtype=torch.float32, grad=False)
    keep, restore, _ = reference.select_patches(scores, _KEEP)
    tokens, token = draw(_BATCH, _PATCHES, _WIDTH), draw(1, 1, _WIDTH)
    yield Call("select_patches", mlomae_kernels.select_patches, reference.select_patches, (scores, _KEEP))
    yield Call(
        "patch_gather", mlomae_kernels.patch_gather, reference.patch_gather,
        (tokens, draw(1, _PATCHES, _WIDTH), keep, token),
    )  # fmt: skip
    yield Call(
        "patch_scatter", mlomae_kernels.patch_scatter, reference.patch_scatter,
        (draw(_BATCH, 1 + _KEEP, _WIDTH), token, restore, draw(1, 1 + _PATCHES, _WIDTH)),
    )  # fmt: skip
    side, numbers = _ROWS * _PATCH, 3 * _PATCH**2
    images = draw(_BATCH, 3, side, side, dtype=torch.float32, grad=False)
    removed = restore.argsort(dim=1)[:, _KEEP:].contiguous()
    weights = draw(*removed.shape, dtype=torch.float32)
    yield Call(
        "masked_patch_loss", partial(mlomae_kernels.masked_patch_loss, patch_size=_PATCH, norm_pix=True),
        partial(reference.masked_patch_loss, patch_size=_PATCH, norm_pix=True),
        (draw(*removed.shape, numbers), images, removed, weights),
    )  # fmt: skip


def error(call: Call) -> float:
    """The largest error of results and gradients in units of what rounding explains; NaN where one is."""
    import torch

    got = _results(call.operator, call.arguments)
    expected = _results(call.reference, tuple(_double(argument) for argument in call.arguments))
    errors = []
    for ours, theirs in zip(got, expected, strict=True):
        rounding = _ROUNDINGS * torch.finfo(ours.dtype).eps if ours.is_floating_point() else 0.0
        scale = theirs.double().abs().max().clamp(min=1.0)
        errors.append((ours.double() - theirs.double()).abs().max() / scale / (rounding + _NOISE))
    return float(torch.stack(errors).max())


class _Inputs:
    """Normal numbers that are the same on every machine, apart from everybody else's."""

    def __init__(self, device: str) -> None:
        import torch

        self._device = device
        self._dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *sizes: int, dtype: Any = None, grad: bool = True) -> Tensor:
        import torch

        drawn = torch.randn(sizes, generator=self._generator)
        return drawn.to(self._device, dtype or self._dtype).requires_grad_(grad)


def _provider(provider: str, device: str) -> Finding:
    import mlomae_kernels
    from mlomae_kernels._native import CUDA_OPERATORS

    with mlomae_kernels.implementation(provider):
        used, _, reason = mlomae_kernels.describe(device).removesuffix(")").partition(" (")
        if used != provider:
            return (
                problem(reason, "install the project again")
                if "cannot be loaded" in reason
                else absent(reason)
            )
        chosen = [
            call
            for call in calls(device)
            if (provider, device) != ("native", "cuda") or call.name in CUDA_OPERATORS
        ]
        return _compare(chosen)


def _linear(device: str) -> Finding:
    from torch.nn import functional as F

    import mlomae_kernels

    draw = _Inputs(device)
    # Large enough for oneDNN where that is used.
    arguments = (draw(256, _WIDTH), draw(128, _WIDTH), draw(128))
    return _compare([Call("linear", mlomae_kernels.linear, F.linear, arguments)])


def _attention(device: str) -> Finding:
    import torch

    import mlomae_kernels
    from mlomae_kernels.ops.attention import BACKENDS, choose_attention

    qkv = _Inputs(device)(_BATCH, _PATCHES, 3, 2, _WIDTH // 2)
    names: dict[str, str] = {}
    why = ""
    for backend in BACKENDS:
        try:
            choice = choose_attention(backend, torch.device(device), qkv.dtype, qkv.shape[4])
        except ValueError:
            continue  # flash, where it cannot be had: auto tells why
        names.setdefault(choice.name, backend)
        why = f"auto takes {choice.name}: {choice.reason}" if backend == "auto" else why
    formula = partial(mlomae_kernels.attention, backend="reference")
    found = _compare(
        [
            Call(name, partial(mlomae_kernels.attention, backend=backend), formula, (qkv,))
            for name, backend in names.items()
        ]
    )
    return Finding(found.status, f"{found.text}; {why}", found.fix)


def _in_use(device: str) -> Finding:
    import mlomae_kernels

    for call in calls(device):
        call.operator(*call.arguments)  # raises where MLOMAE_KERNELS asks for what is not here
    return ok(mlomae_kernels.describe(device))


def _compare(chosen: list[Call]) -> Finding:
    """Each call on its own: one that fails does not hide the others."""
    wrong = {}
    for call in chosen:
        try:
            distance = error(call)
        except Exception as failure:
            wrong[call.name] = first_line(failure)
        else:
            if not distance <= 1:  # also where it is no number
                wrong[call.name] = f"{distance:.1g} times as far from plain PyTorch as rounding explains"
    if wrong:
        return problem("; ".join(f"{name}: {text}" for name, text in wrong.items()))
    return ok(f"{', '.join(call.name for call in chosen)}: as plain PyTorch in float64")


def _results(function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Tensor]:
    """The results of a function, and the gradients of a weighted sum of the first one."""
    import torch

    result = function(*arguments)
    results = list(result) if isinstance(result, tuple) else [result]
    leaves = [value for value in arguments if isinstance(value, torch.Tensor) and value.requires_grad]
    if not leaves:
        return results
    # Whole numbers, which every precision holds exactly.
    cotangent = (torch.arange(results[0].numel()) % 7 - 3).view_as(results[0]).to(results[0])
    return [*(value.detach() for value in results), *torch.autograd.grad(results[0], leaves, cotangent)]


def _double(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value
