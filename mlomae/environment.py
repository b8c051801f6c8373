"""With what a run is computed: versions, device, precision. Part of its report."""

from __future__ import annotations

import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "timm", "deepspeed", "flash-attn", "webdataset")


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Versions of what is installed, and the name of the device."""
    return {
        "mlomae": package_version("mlomae"),
        "python": platform.python_version(),
        **{package: version for package in PACKAGES if (version := package_version(package))},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
    }


def package_version(package: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The processor's name as its maker writes it, where the system tells it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
