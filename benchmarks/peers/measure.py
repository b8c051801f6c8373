"""What every peer's process does: build, warm up, measure, and print one line of JSON.

Time, processor time and memory are those of the whole outer iteration. Peak memory is the process's
largest resident set above what it had before the first module was built, so that neither the
interpreter nor imported libraries count. FLOPs are counted in further, untimed iterations.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import torch
import torch._dynamo  # the first optimizer would import it, and its 100 MB would count as the peer's
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.peers.problem import CYCLES, NETWORKS, SIZES, configure, write_images
from mlomae.config import Config
from mlomae.data.loader import LevelLoaders

MIB = 2**20


@dataclass
class Peer:
    """One peer, ready to run.

    Attributes:
        iterate: takes one outer iteration, given its number.
        watched: weights of the masking network that its steps must move; None without one.
    """

    iterate: Callable[[int], None]
    watched: Tensor | None = None


Build = Callable[[Config, Path, int], Peer]
"""(configuration, empty folder for what a run leaves, outer iterations to come) → the peer."""


@dataclass
class Measurement:
    """What a process prints; all per outer iteration, means over a variant's cycle.

    Attributes:
        wall: seconds, one entry per round.
        cpu: processor seconds of all threads, one entry per round.
        peak: bytes, at the largest resident set.
        flops: None where they were not asked for.
        mask_moved: largest change of the watched weights; None where there are none.
    """

    peer: str
    versions: dict[str, str]
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak: int = 0
    flops: float | None = None
    mask_moved: float | None = None


def main(
    name: str,
    build: Build,
    packages: tuple[str, ...] = (),
    variants: Mapping[str, dict[str, str]] | None = None,
) -> None:
    """The command line of a peer.

    Args:
        packages: distributions whose versions belong to the figures.
        variants: configuration overrides by name, where the peer has several variants.
    """
    parser = argparse.ArgumentParser(description=f"Measures outer iterations of {name}.")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--rounds", type=int, metavar="N", help="measured rounds; default: the size's")
    parser.add_argument("--network", choices=NETWORKS, default="token", help="masking network")
    parser.add_argument("--flops", action="store_true", help="count FLOPs too")
    parser.add_argument("--memory", action="store_true", help="two iterations for the peak memory alone")
    if variants is not None:
        parser.add_argument("--variant", choices=variants, default=next(iter(variants)))
    arguments = parser.parse_args()

    variant = getattr(arguments, "variant", None)
    cycle = CYCLES.get(variant, 1)
    rounds = SIZES[arguments.size].rounds if arguments.rounds is None else arguments.rounds
    warm_up = SIZES[arguments.size].warm_up
    versions = {package: metadata.version(package) for package in ("torch", *packages)}
    found = Measurement(name if variant is None else f"{name}-{variant}", versions)
    with tempfile.TemporaryDirectory() as scratch:
        images, run_dir = Path(scratch) / "images", Path(scratch) / "run"
        write_images(images)
        overrides = None if variants is None else variants[variant]
        config = configure(arguments.size, arguments.network, images, overrides)
        _load_libraries(config)
        before = _memory("VmRSS")
        peer = build(config, run_dir, warm_up + cycle * (rounds + bool(arguments.flops)))
        watched = None if peer.watched is None else peer.watched.detach().clone()
        if arguments.memory:
            # The same point of two cycles: the second one meets the optimizers' state.
            peer.iterate(0)
            peer.iterate(cycle)
        else:
            _measure(peer, found, warm_up, rounds, cycle)
        found.peak = _memory("VmHWM") - before
        if arguments.flops:
            found.flops = _count_flops(peer, warm_up + rounds * cycle, cycle)
        if watched is not None and peer.watched is not None:
            found.mask_moved = float((peer.watched.detach() - watched).abs().max())
    print(json.dumps(asdict(found)), flush=True)


def _load_libraries(config: Config) -> None:
    """Whatever is imported or set up at its first use, so that it does not count as a peer's memory."""
    loaders = LevelLoaders(config)
    loaders.pretrain.next()
    loaders.close()
    square = torch.rand(256, 256, requires_grad=True)
    (square @ square).sum().backward()


def _measure(peer: Peer, found: Measurement, warm_up: int, rounds: int, cycle: int) -> None:
    for number in range(warm_up):
        peer.iterate(number)
    for first in range(warm_up, warm_up + rounds * cycle, cycle):
        wall, cpu = time.perf_counter(), time.process_time()
        for number in range(first, first + cycle):
            peer.iterate(number)
        found.wall.append((time.perf_counter() - wall) / cycle)
        found.cpu.append((time.process_time() - cpu) / cycle)


class _Total:
    """In place of the tracker that splits the count by module: its hooks cannot be combined with
    ``torch.autograd.grad`` of a leaf, and only the total is of interest."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def _count_flops(peer: Peer, first: int, cycle: int) -> float:
    # Not in torch's table: the CPU's fused attention, and oneDNN's products.
    missing = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    if (linear := getattr(torch.ops.mkldnn, "_linear_pointwise", None)) is not None:
        missing[linear] = _linear_flops
    counter = FlopCounterMode(display=False, custom_mapping=missing)
    counter.mod_tracker = _Total()
    with counter:
        for number in range(first, first + cycle):
            peer.iterate(number)
    return counter.get_total_flops() / cycle


Shape = tuple[int, ...]


def _attention_flops(query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(
    grad: Shape, query: Shape, key: Shape, value: Shape, *_: object, **__: object
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def _linear_flops(x: Shape, weight: Shape, *_: object, **__: object) -> int:
    return 2 * math.prod(x) * weight[0]


def _memory(name: str) -> int:
    """A figure of this process's memory in bytes: VmRSS, resident now, or VmHWM, at its highest."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, name
    return int(found[1]) * 1024
