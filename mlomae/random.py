"""Counter-based random numbers: a pure function of (seed, purpose, step, sample, element).

Nothing in a training step draws from a stateful generator. The noise of the mask selection, the
crops and the flips are all functions of counters, so a step can be replayed exactly, a resumed run
needs no generator state, and the numbers of a global batch do not depend on how many ranks or
loader processes share it, nor on the device.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def stream_seed(seed: int, *names: str | int) -> int:
    """A 32-bit seed for the stream called ``names`` of the run ``seed``; distinct names decorrelate."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.blake2s(text.encode(), digest_size=4).digest(), "little")


def counter_uniform(
    seed: int, step: int, first_row: int, shape: tuple[int, int], device: torch.device | str = "cpu"
) -> Tensor:
    """Uniform numbers in the open interval (0, 1).

    Args:
        seed: from ``stream_seed``.
        step: counter of the batch.
        first_row: position of row 0 in the global batch (rank * rows for an even share).
        shape: (rows, columns).

    Returns:
        float32 [rows, columns]; row i depends on (seed, step, first_row + i) only.
    """
    return counter_uniforms(seed, step, 1, first_row, shape, device)[0]


def counter_uniforms(
    seed: int,
    first_step: int,
    num_steps: int,
    first_row: int,
    shape: tuple[int, int],
    device: torch.device | str = "cpu",
) -> Tensor:
    """``counter_uniform`` of consecutive steps at the price of one: float32 [num_steps, rows, columns]."""
    steps = torch.arange(first_step, first_step + num_steps, device=device, dtype=torch.int64)
    rows = torch.arange(first_row, first_row + shape[0], device=device, dtype=torch.int64)
    columns = torch.arange(shape[1], device=device, dtype=torch.int64)
    state = _absorb(torch.full_like(steps, seed), steps & _MASK)
    bits = _absorb(_absorb(state[:, None], rows)[:, :, None], columns)
    # 23 bits and a half: representable exactly in float32, never 0 or 1.
    return ((bits >> 9).to(torch.float32) + 0.5) * 2.0**-23


def _absorb(state: Tensor, counter: Tensor) -> Tensor:
    """The next state. The counter is mixed on its own first: otherwise states that are close to each
    other would give shifted copies of one sequence.
    """
    return _mix(state ^ _mix(counter + _GOLDEN))


def _mix(x: Tensor) -> Tensor:
    """An avalanche permutation of 32-bit values held in int64 (two rounds of multiply and xor-shift)."""
    x = x & _MASK
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _MASK
    return x ^ (x >> 16)
