"""The encoder as a graph that runs without this package: ONNX, and torch.export's own format."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlomae.errors import UserError
from mlomae.interop.encoder import Encoder
from mlomae.interop.pretrained import FACTS, Facts, Pretrained

# A file of protocol buffers cannot be larger; weights above it go to a second file.
_ONNX_LIMIT = 2**31 - 2**24  # bytes
# Of the exported features, relative to the largest: a wrong graph is far beyond. Measured with a ViT-B:
# 1.3e-6, and 2e-5 with weights so noisy that torch's own float32 is 1.4e-5 from float64.
_TOLERANCE = 1e-4
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


def write_onnx(pretrained: Pretrained, path: Path) -> None:
    """A graph from ``images`` [B, C, H, W] to ``features`` [B, F]; weights above 2 GB go to NAME.data beside.

    Raises:
        UserError: a package is missing, or ONNX Runtime computes other features.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(f"--to onnx: {', '.join(missing)} not installed; pip install 'mlomae[onnx]'")
    encoder = Encoder(pretrained).eval()
    size = sum(tensor.numel() * tensor.element_size() for tensor in pretrained.encoder.values())
    with torch.no_grad():
        program: Any = torch.onnx.export(
            encoder,
            (_images(encoder, 2),),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
        program.model.metadata_props[FACTS] = _facts(pretrained)
        program.save(path, external_data=size > _ONNX_LIMIT)
    _verify(encoder, path)


def write_pt2(pretrained: Pretrained, path: Path) -> None:
    """A program from images [B, C, H, W] to features [B, F], B of 1 or more."""
    encoder = Encoder(pretrained).eval()
    with torch.no_grad():
        program = torch.export.export(
            encoder, (_images(encoder, 2),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
    torch.export.save(program, path, extra_files={f"{FACTS}.json": _facts(pretrained)})


def _verify(encoder: Encoder, path: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        images = _images(encoder, batch)
        with torch.inference_mode():
            expected = encoder(images)
        found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        error = float((found - expected).abs().max() / expected.abs().max())
        if not error <= _TOLERANCE:
            raise UserError(
                f"--to onnx: ONNX Runtime {onnxruntime.__version__} computes features that differ by "
                f"{error:.1e} of their size; nothing is kept"
            )


def _images(encoder: Encoder, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, encoder.in_chans, *encoder.img_size, generator=generator)


def _facts(pretrained: Pretrained) -> str:
    return json.dumps(Facts.of(pretrained).model_dump(mode="json"))
