"""Starts a peer's process and reads what it measured."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks.environment import ROOT

PACKAGES = ROOT / ".venv-peers"
INSTALL = (
    "pip install --no-deps --ignore-requires-python --target .venv-peers -r benchmarks/peers/requirements.txt"
)
_TIMEOUT_S = 3600

Found = dict[str, Any]
"""A ``Measurement`` as read from a process."""


def require_packages(*names: str) -> None:
    """Skips the benchmark where the peers' packages are not installed."""
    missing = [name for name in names if not (PACKAGES / name).is_dir()]
    if missing:
        pytest.skip(f"{', '.join(missing)}: not installed; {INSTALL}")


def run_peer(
    peer: Sequence[str], size: str, *options: str, environment: dict[str, str] | None = None
) -> Found:
    """One process of a peer.

    Args:
        peer: its module below ``benchmarks.peers``, and arguments.
        environment: variables beside those of this process.
    """
    module, *arguments = peer
    command = [sys.executable, "-m", f"benchmarks.peers.{module}", *arguments, "--size", size, *options]
    # The folder of peers is on the path of these processes only, and no GPU is visible.
    path = os.pathsep.join(filter(None, [str(PACKAGES), os.environ.get("PYTHONPATH")]))
    settings = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    settings |= environment or {}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=_TIMEOUT_S)
    if done.returncode:
        pytest.fail(f"{' '.join(command[1:])} exited with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def wall(runs: Sequence[Found]) -> float:
    """Median seconds of an outer iteration."""
    return statistics.median(seconds for run in runs for seconds in run["wall"])


def ratio(above: Sequence[Found], below: Sequence[Found]) -> float:
    """Median over the rounds of the ratio of wall times, both of one round."""
    return statistics.median(wall([a]) / wall([b]) for a, b in zip(above, below, strict=True))
