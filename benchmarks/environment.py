"""Where and with what a figure was measured: the part of every record that makes it comparable."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from mlomae.environment import cpu_name, package_version

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_PACKAGES = ("torch", "triton", "timm", "numpy", "scikit-learn")


def environment(device: str = "cpu") -> dict[str, Any]:
    """Commit, machine and versions.

    Args:
        device: what was measured: "cpu" or the name of a GPU.
    """
    return {
        "git": _git(),
        "machine": {
            "device": device,
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "system": platform.system(),
        },
        "versions": {
            "python": platform.python_version(),
            **{package: version for package in _PACKAGES if (version := package_version(package))},
            **({} if device == "cpu" else {"cuda": torch.version.cuda or torch.version.hip}),
        },
    }


def slug(name: str) -> str:
    """'Intel(R) Xeon(R) Processor' → 'intel-xeon-processor'."""
    plain = re.sub(r"\((r|tm)\)", "", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def _git() -> dict[str, Any]:
    """The commit, and whether the files measured differ from it; recorded results do not count."""
    sha = _git_output("rev-parse", "HEAD")
    changes = _git_output("status", "--porcelain", "--", ".", f":!{RESULTS.relative_to(ROOT)}")
    return {"sha": sha, "dirty": None if changes is None else bool(changes)}


def _git_output(*arguments: str) -> str | None:
    """What git prints; None outside a clone."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
