"""Masked autoencoders whose masks are learned for the downstream task by multilevel optimisation."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlomae.interop.encoder import load_encoder

__version__ = "0.1.0"
__all__ = ["__version__", "load_encoder"]


def __getattr__(name: str) -> object:
    # Imported at the first use: the package itself loads neither torch nor timm.
    if name == "load_encoder":
        from mlomae.interop.encoder import load_encoder

        return load_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
