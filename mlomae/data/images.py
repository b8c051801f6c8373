"""Decoding of one image file to uint8 pixels."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from mlomae.errors import UserError

MODES = {1: "L", 3: "RGB"}  # channels → Pillow mode


def decode_image(content: Path | BinaryIO, in_chans: int, name: str) -> Tensor:
    """Decodes an 8-bit image and converts it to grey (1 channel) or RGB (3).

    Args:
        content: a file, or an open stream of its bytes.
        in_chans: a key of ``MODES``.
        name: what an error calls the image.

    Returns:
        uint8 [in_chans, H, W].

    Raises:
        UserError: the bytes are no readable 8-bit image.
    """
    from PIL import Image

    try:
        with Image.open(content) as image:
            if image.mode[0] in "IF":
                # Pillow clips wider pixels instead of scaling them: nearly all of them would become white.
                raise ValueError(f"pixels of mode {image.mode}, not 8 bits")
            pixels = np.array(image.convert(MODES[in_chans]))
    except Exception as error:  # Pillow's plug-ins raise nearly every type on damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name}: cannot be decoded ({reason}); replace it by a valid 8-bit image") from None
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], in_chans)).permute(2, 0, 1).contiguous()
