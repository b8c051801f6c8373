"""The patch operators of a masked autoencoder.

Importing this package imports torch only: it starts no CUDA context and loads no native code, which is
looked for at the first use. ``native_status()`` tells whether it was found and, if not, why.
"""

from mlomae_kernels._native import NativeStatus, native_status
from mlomae_kernels.dispatch import select_patches
from mlomae_kernels.reference import masked_patch_loss, patch_gather, patch_scatter, patchify, unpatchify

__all__ = [
    "NativeStatus",
    "masked_patch_loss",
    "native_status",
    "patch_gather",
    "patch_scatter",
    "patchify",
    "select_patches",
    "unpatchify",
]
