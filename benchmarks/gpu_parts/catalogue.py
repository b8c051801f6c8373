"""The parts of ``benchmarks/gpu.py``: what each needs, in the order of their worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_HERE = "benchmarks.gpu_parts"


@dataclass(frozen=True)
class Part:
    """One part; it runs in a process of its own (``conductor``).

    Attributes:
        name: of the part, for ``--only`` and the record.
        module: its ``run(job)`` prepares, yields once, and measures (``job``).
        about: one line.
        gigabytes: device memory that it takes at most while it prepares beside others.
        prepare, measure: seconds that each half may take.
        argument: told to the module.
    """

    name: str
    module: str
    about: str
    gigabytes: float
    prepare: float
    measure: float
    argument: str = ""


def _part(name: str, about: str, gigabytes: float, prepare: float, measure: float, *how: str) -> Part:
    """``how``: module and argument, where the module has another name."""
    module, argument = how or (name, "")
    return Part(name, f"{_HERE}.{module}", about, gigabytes, prepare, measure, argument)


# What the models hold was estimated from their sizes: 16 bytes per weight, 32 per activation's channel.
PARTS = (
    _part("ceilings", "matrix products and copies: what the device reaches", 1, 90, 30),
    _part("correctness", "every kernel against plain PyTorch in float64", 10, 170, 5),
    _part("bandwidth", "the kernels against eager, torch.compile and the copy bandwidth", 13, 170, 60),
    _part("steps-l16", "a plain pretraining step of ViT-L/16", 24, 190, 45, "steps", "l16"),
    _part("steps-b16", "a plain pretraining step of ViT-B/16", 23, 190, 45, "steps", "b16"),
    _part("peers", "images/s beside a MAE of timm's blocks and transformers' own", 20, 150, 40),
    _part("outer", "an outer iteration over its plain steps; where the host waits", 18, 230, 90),
    _part("steps-h14", "a plain pretraining step of ViT-H/14", 29, 210, 50, "steps", "h14"),
    _part("attention", "back ends of attention at the shapes of the models", 3, 90, 40),
)
GROUPS = {"steps": ("steps-b16", "steps-l16", "steps-h14")}


def choose(names: str | None) -> tuple[Part, ...]:
    """The parts that ``--only`` names, in the order of the catalogue; all of them for None.

    Raises:
        ValueError: there is no part of that name.
    """
    if names is None:
        return PARTS
    wanted = {part for name in names.split(",") for part in GROUPS.get(name, (name,))}
    known = [part.name for part in PARTS]
    if unknown := sorted(wanted.difference(known)):
        raise ValueError(f"--only: no part {unknown[0]!r}; there are {', '.join([*known, *GROUPS])}")
    return tuple(part for part in PARTS if part.name in wanted)


def next_wave(parts: Sequence[Part], gigabytes: float, processes: int) -> list[Part]:
    """Those of the first parts that can prepare side by side; one at least.

    Args:
        gigabytes: of device memory.
        processes: parts at most.
    """
    wave: list[Part] = []
    for part in parts:
        fits = sum(other.gigabytes for other in wave) + part.gigabytes <= gigabytes
        if not wave or (fits and len(wave) < processes):
            wave.append(part)
    return wave
