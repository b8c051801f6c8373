"""The patch operators of a masked autoencoder, also as ``torch.ops.mlomae``.

Importing this package imports torch only: it starts no CUDA context and loads neither native code nor
Triton, which are looked for at the first use. ``describe(device_type)`` tells which implementation is
used on a device and why.
"""

from mlomae_kernels.dispatch import describe, implementation
from mlomae_kernels.ops.attention import attention
from mlomae_kernels.ops.linear import linear
from mlomae_kernels.ops.masked_patch_loss import masked_patch_loss
from mlomae_kernels.ops.patch_gather import patch_gather
from mlomae_kernels.ops.patch_scatter import patch_scatter
from mlomae_kernels.ops.select_patches import select_patches
from mlomae_kernels.reference import patchify, unpatchify

__all__ = [
    "attention",
    "describe",
    "implementation",
    "linear",
    "masked_patch_loss",
    "patch_gather",
    "patch_scatter",
    "patchify",
    "select_patches",
    "unpatchify",
]
