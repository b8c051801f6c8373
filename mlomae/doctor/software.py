"""Python, torch and the other packages, against what the project requires; the driver of the GPU."""

from __future__ import annotations

import platform
import re
import sys
from functools import partial
from importlib import metadata
from pathlib import Path

from mlomae.doctor.checks import Check, Finding, absent, ok, problem

GROUP = "software"
# These have a line of their own, the other requirements share one.
_NAMED = ("triton", "deepspeed", "timm", "webdataset", "nvidia-ml-py")
_OPTIONAL = ("flash-attn",)
_DRIVER = Path("/proc/driver/nvidia/version")


def software_checks() -> list[Check]:
    again = "run the install command of README.md again"
    return [
        Check(GROUP, "Python", _python, again),
        Check(GROUP, "torch", _torch, again),
        Check(GROUP, "NVIDIA driver", _driver, "install torch for the driver's CUDA, or a newer driver"),
        *(Check(GROUP, name, partial(_package, name), again) for name in _NAMED),
        *(Check(GROUP, name, partial(_optional, name), again) for name in _OPTIONAL),
        Check(GROUP, "other packages", _others, again),
    ]


def release(version: str) -> tuple[int, ...]:
    """The numbers at the beginning of a version: 2.11.0+cu128 → (2, 11, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def requirements() -> dict[str, str]:
    """The lowest version of every package that this platform needs; empty for any."""
    found = {}
    for line in metadata.requires("mlomae") or ():
        requirement, _, marker = line.partition(";")
        platforms = re.search(r"sys_platform == .(\w+)", marker)
        if "extra ==" in marker or (platforms and platforms[1] != sys.platform):
            continue
        name, _, lowest = requirement.strip().partition(">=")
        found[name.strip()] = lowest.strip()
    return found


def _python() -> Finding:
    needed = metadata.metadata("mlomae")["Requires-Python"].removeprefix(">=")
    version = platform.python_version()
    if release(version) < release(needed):
        fix = "make a virtual environment with a newer Python"
        return problem(f"{version}, needed is {needed} or later", fix)
    return ok(f"{version} ({sys.executable})")


def _torch() -> Finding:
    import torch

    kind = "CPU build"
    if torch.version.cuda is not None:
        kind = f"built for CUDA {torch.version.cuda}"
    elif torch.version.hip is not None:
        kind = f"built for ROCm {torch.version.hip}"
    found = _package("torch")
    return Finding(found.status, f"{found.text}, {kind}", found.fix)


def _driver() -> Finding:
    import torch

    try:
        told = re.search(r"\d+(?:\.\d+)+", _DRIVER.read_text())
    except OSError:
        return absent("no driver, no GPU of NVIDIA's")
    version = told[0] if told else "of unknown version"
    if torch.version.cuda is None:
        return problem(f"{version}, but torch is no CUDA build", "install torch for CUDA: see pytorch.org")
    torch.cuda.init()  # raises where the driver is too old
    return ok(f"{version}, takes CUDA {torch.version.cuda}")


def _package(name: str) -> Finding:
    needed = requirements()
    if name not in needed:
        return absent(f"not needed on {sys.platform}")
    lowest = needed[name]
    wanted = f"{name}>={lowest}" if lowest else name
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return problem(f"not installed, needed is {wanted}", f"pip install '{wanted}'")
    if release(version) < release(lowest):
        return problem(f"{version}, needed is {lowest} or later", f"pip install -U '{wanted}'")
    return ok(version)


def _optional(name: str) -> Finding:
    try:
        return ok(metadata.version(name))
    except metadata.PackageNotFoundError:
        return absent("not installed; nothing needs it")


def _others() -> Finding:
    names = sorted(set(requirements()) - {"torch", *_NAMED})
    found = {name: _package(name) for name in names}
    wrong = {name: finding for name, finding in found.items() if finding.status == "problem"}
    if wrong:
        texts = "; ".join(f"{name}: {finding.text}" for name, finding in wrong.items())
        return problem(texts, "; ".join(finding.fix for finding in wrong.values()))
    return ok(f"{len(found)} as required: {', '.join(found)}")
