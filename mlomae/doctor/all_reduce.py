"""One of the processes of a real all-reduce: ``all_reduce.py BACKEND STORE RANK SIZE SECONDS``.

Run as a file, and imports torch only: it must also tell about torch where the rest does not work.
"""

from __future__ import annotations

import sys
from datetime import timedelta

import torch
import torch.distributed as dist


def main(backend: str, store: str, rank: int, size: int, seconds: float) -> None:
    """Adds 1, 2, … ``size`` across processes, and compares.

    Args:
        store: path of a file that all of them see, and that is not there yet.
    """
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limit = timedelta(seconds=seconds)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size, timeout=limit)
    tensor = torch.full((1000,), rank + 1.0, device=device)
    dist.all_reduce(tensor)
    expected = size * (size + 1) / 2
    if not bool((tensor == expected).all()):
        raise SystemExit(f"the sum is {float(tensor[0])}, expected {expected}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
