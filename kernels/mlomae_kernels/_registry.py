"""Registers an operator once with torch: schema, implementations, shapes for tracing, derivatives.

What happens at a call of ``torch.ops.mlomae.NAME``, from the outside in:

* autocast (where the operator mixes activations with parameters): all floating arguments are converted
  to the widest of their dtypes, as torch does for ``cat``; outside autocast a mix of dtypes is an error.
* ``torch.func`` transforms, forward-mode tangents, and gradients that have no formula here: plain
  PyTorch, which has all derivatives. Nothing is ever silently without a derivative.
* autograd: the operator's backward operator.
* the device: see ``dispatch``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mlomae_kernels.dispatch import debug, fast_implementation

_LIBRARY = torch.library.Library("mlomae", "DEF")

Gradient = type[torch.autograd.Function]


class Operator:
    """One operator of ``torch.ops.mlomae``.

    Args:
        schema: ``name(arguments) -> results`` in torch's schema language.
        reference: plain PyTorch; checks its own arguments.
        check: raises ValueError for shapes, dtypes and devices that no implementation accepts.
        fake: results of the right shape and dtype without data.
        check_values: raises ValueError for wrong indices; None where there are none.
        promotes: whether autocast converts floating arguments to their widest dtype.
    """

    def __init__(
        self,
        schema: str,
        *,
        reference: Callable[..., Any],
        check: Callable[..., None],
        fake: Callable[..., Any],
        check_values: Callable[..., None] | None = None,
        promotes: bool = False,
    ) -> None:
        self.name = schema.partition("(")[0]
        self._reference = reference
        self._check = check
        self._check_values = check_values
        self._gradient: Gradient | None = None
        self._differentiable: tuple[int, ...] = ()
        _LIBRARY.define(schema)
        self.overload = getattr(torch.ops.mlomae, self.name).default

        def checked_fake(*args: Any) -> Any:
            check(*args)
            return fake(*args)

        _LIBRARY.impl(self.name, self._compute, "CompositeExplicitAutograd")
        torch.library.register_fake(f"mlomae::{self.name}", checked_fake, lib=_LIBRARY)
        _LIBRARY.impl(self.name, self._autograd, "Autograd")
        # Under vmap plain PyTorch is taken apart into operations that have batching rules.
        _LIBRARY.impl(self.name, reference, "FuncTorchBatched")
        if promotes:
            for device_type in ("cpu", "cuda"):
                key = f"Autocast{device_type.upper()}"
                _LIBRARY.impl(self.name, self._promoting(device_type), key)

    def differentiate(self, gradient: Gradient | None, arguments: tuple[int, ...]) -> None:
        """Gives the operator its derivative.

        Args:
            gradient: its ``forward`` calls ``below_autograd``, its ``backward`` other operators; None for
                results without gradient.
            arguments: positions of the arguments that this holds for.
        """
        self._gradient = gradient
        self._differentiable = arguments

    def below_autograd(self, *args: Any) -> Any:
        """The results without a graph."""
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*args)

    def _compute(self, *args: Any) -> Any:
        device_type = next(a for a in args if isinstance(a, Tensor)).device.type
        fast = fast_implementation(self.name, device_type)
        self._check(*args)
        # Native code on the CPU checks indices itself.
        if self._check_values is not None and (debug() or (fast is None and device_type == "cpu")):
            self._check_values(*args)
        return self._reference(*args) if fast is None else fast(*args)

    def _autograd(self, *args: Any) -> Any:
        tensors = [(i, a) for i, a in enumerate(args) if isinstance(a, Tensor)]
        if any(is_transformed(tensor) for _, tensor in tensors):
            return self._reference(*args)
        if torch.is_grad_enabled():
            needing = [i for i, tensor in tensors if tensor.requires_grad]
            if any(i not in self._differentiable for i in needing):
                return self._reference(*args)
            if needing and self._gradient is not None:
                return self._gradient.apply(*args)
        return self.below_autograd(*args)

    def _promoting(self, device_type: str) -> Callable[..., Any]:
        def promote(*args: Any) -> Any:
            dtype = None
            for arg in args:
                if isinstance(arg, Tensor) and arg.is_floating_point():
                    dtype = arg.dtype if dtype is None else torch.promote_types(dtype, arg.dtype)
            with torch.autocast(device_type, enabled=False):
                return self.overload(
                    *(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
                )

        return promote


def is_transformed(tensor: Tensor) -> bool:
    """Whether a torch.func transform wraps the tensor or it carries a forward-mode tangent."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None
