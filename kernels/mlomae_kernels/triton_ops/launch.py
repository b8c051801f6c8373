"""What the launchers share: where and how a kernel is started, and how large its tiles are.

The rules below replace a search for the best settings: they depend on shapes only, so that a run starts
at once and adds up in the same order every time. All kernels move or reduce rows, so one rule serves: a
warp holds 1024 numbers, which are 8 vector accesses of 16 bytes in float32 and 4 in bfloat16 in each of
its 32 threads, and a program holds as many rows as keep a few tens of kilobytes in flight on a processor.
"""

from __future__ import annotations

import contextlib
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Decided when the kernels are decorated: run them in Python on CPU tensors instead of compiling them.
INTERPRETING: Final[bool] = triton.knobs.runtime.interpret

_NUMBERS_PER_WARP = 1024
_MAX_WARPS = 16
# Blocks that a wide row is cut into.
_BLOCK_WIDTHS = (1024, 512, 256, 128)
# What the programs of a kernel that loops over the batch keep in flight on a processor, and how many of
# them there are at least. Registers allow for as many, so that all of them run at once.
_BYTES_IN_FLIGHT = 48 * 1024
_MIN_PROGRAMS = 4
# Where there is no GPU to ask (interpreter, compilation ahead of time): those of an H100.
DEFAULT_PROCESSORS = 132


class Tile(NamedTuple):
    """Rows and width of what a program handles at once, and its number of warps."""

    rows: int
    width: int
    num_warps: int


class BatchSplit(NamedTuple):
    """How many programs share the batch, and how many images each of them takes."""

    splits: int
    images: int


def run(kernel: Any, grid: tuple[int, ...], out: Tensor, *args: object, **constants: object) -> None:
    """Launches ``kernel`` on the device of ``out``, its first argument."""
    with torch.cuda.device(out.device) if out.is_cuda else contextlib.nullcontext():
        kernel[grid](out, *args, **constants)


def ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below ``number`` (1 for 0)."""
    return 1 << max(number - 1, 0).bit_length()


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The Triton dtype in which tensors of ``dtype`` are added up: float32, or float64 for float64."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The same for torch."""
    return torch.promote_types(dtype, torch.float32)


def num_warps(numbers: int, dtype: torch.dtype) -> int:
    """Warps of a program that holds a tile of so many numbers, a power of two; twice as many in float64."""
    registers = numbers * accumulator_dtype(dtype).itemsize // 4
    return min(max(registers // _NUMBERS_PER_WARP, 1), _MAX_WARPS)


def row_tile(rows: int, width: int, dtype: torch.dtype, numbers: int, images: int = 1) -> Tile:
    """Tile over ``rows`` rows of ``width`` numbers, for ``images`` images and ``numbers`` in all."""
    block_width = _block_width(width)
    block_rows = min(power_of_two(rows), max(numbers // (block_width * images), 1))
    return Tile(block_rows, block_width, num_warps(images * block_rows * block_width, dtype))


def _block_width(width: int) -> int:
    """The widest block with at most a quarter of its lanes idle, or else the one with the fewest."""
    blocks = [block for block in _BLOCK_WIDTHS if block <= power_of_two(width)] or [power_of_two(width)]
    idle = {block: 1 - width / (ceil_div(width, block) * block) for block in blocks}
    return min(blocks, key=lambda block: (max(idle[block], 0.25), -block))


def split_batch(batch: int, images: int, tiles: int, tile: Tile, grad: Tensor) -> BatchSplit:
    """Shares the batch among programs that loop over it.

    Each program leaves one partial sum, hence no more programs than run at once.

    Args:
        batch: B.
        images: images of one iteration.
        tiles: programs for one image.
        tile: rows of one of these images.
        grad: tensor that is read.
    """
    processors = DEFAULT_PROCESSORS
    if grad.is_cuda:
        processors = torch.cuda.get_device_properties(grad.device).multi_processor_count
    in_flight = images * tile.rows * tile.width * grad.element_size()
    programs = processors * max(_BYTES_IN_FLIGHT // in_flight, _MIN_PROGRAMS)
    each = ceil_div(ceil_div(batch, max(programs // tiles, 1)), images) * images
    return BatchSplit(ceil_div(batch, each), each)
