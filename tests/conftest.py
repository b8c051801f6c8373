"""Settings shared by all tests: one thread, fixed seeds, and skips that give their reason."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

# Before torch or a hub client is imported: no test may reach the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# For the processes that tests start: another number of threads adds up in another order, and runs
# that are compared bit for bit must not differ in it.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest

# torch.compile imports it, which fails from then on if anything looked for pip before (Python 3.11).
import setuptools  # noqa: F401
import torch
from hypothesis import settings
from PIL import Image

# Shells start background jobs with SIGINT ignored, and the tests of Ctrl-C send it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Triton's kernels run in its interpreter where there is no GPU. Read when a kernel is defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# The tensors of the tests are too small to share among threads, and a fixed count keeps sums repeatable.
torch.set_num_threads(1)

# Test processes at a time: each loads torch, and starts up to three ranks.
MOST_WORKERS = 4

# No deadline, since a first call may compile; derandomised, so that a red test is red for everyone.
settings.register_profile("mlomae", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("mlomae")


@pytest.fixture(autouse=True)
def _fixed_seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Test processes of ``-n auto``: one per core, but none beside this one for single files."""
    cores = min(os.cpu_count() or 1, MOST_WORKERS)
    single = all(".py" in argument for argument in config.args)
    return 0 if single or cores == 1 else cores


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture
def fill_images(tmp_path: Path) -> Callable[..., Path]:
    """Writes 8x8 images of noise into two class folders, or into none; returns their folder."""
    numbers = count()

    def fill(mode: str = "RGB", amount: int = 60, labelled: bool = True, first: int = 0) -> Path:
        root = tmp_path / f"images{next(numbers)}"
        for seed in range(first, first + amount):
            folder = root / f"class{seed % 2}" if labelled else root
            folder.mkdir(parents=True, exist_ok=True)
            shape = (8, 8) if mode == "L" else (8, 8, 3)
            pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{seed:04d}.png")
        return root

    return fill
