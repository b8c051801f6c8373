"""Compiles every Triton kernel for several GPUs, without one, and reads what the code needs.

``python -m tests.ops.ahead_of_time`` prints registers, shared memory and spills of every case as JSON;
with ``--update`` it rewrites the record that the test compares with. The launchers themselves are called,
with tensors that have no data, so that settings and specialisations are those of a real call.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget

from mlomae_kernels.triton_ops import launch, masked_patch_loss, patch_gather, patch_scatter, select_patches

RECORD = Path(__file__).with_name("resources.json")
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_GATHER_BACKWARD = patch_gather.patch_gather_backward
_SCATTER_BACKWARD = patch_scatter.patch_scatter_backward
_LOSS_BACKWARD = masked_patch_loss.masked_patch_loss_backward
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_AMD_COUNTS = ("vgpr_count", "vgpr_spill_count")

Call = Callable[[], object]


class Shape(NamedTuple):
    """The sizes of one model and batch."""

    batch: int
    patches: int
    keep: int
    width: int
    decoder_width: int
    image_size: int
    patch_size: int


SHAPES = {
    "vit_l16": Shape(256, 196, 49, 1024, 512, 224, 16),
    "vit_b2": Shape(512, 256, 64, 768, 512, 32, 2),
}


class Usage(NamedTuple):
    """Registers of a thread, bytes of shared memory, bytes (AMD: registers) spilled, threads of a program,
    programs for each processor, bytes of the narrowest store of a thread (NVIDIA only).
    """

    registers: int
    shared: int
    spills: int
    threads: int
    programs: int
    store: int


def cases() -> dict[str, Call]:
    """Calls of the launchers by name."""
    return {
        f"{name} {size} {str(dtype).removeprefix('torch.')}": call
        for size, shape in SHAPES.items()
        for dtype in (torch.float32, torch.bfloat16)
        for name, call in [*_token_cases(shape, dtype), *_loss_cases(shape, dtype)]
    }


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _ids(*shape: int) -> Tensor:
    return _empty(*shape, dtype=torch.int64)


def _token_cases(shape: Shape, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    batch, patches, keep, width, decoder_width = shape[:5]
    ids_keep, ids_restore = _ids(batch, keep), _ids(batch, patches)

    def tokens(count: int, width: int, batch: int = 1) -> Tensor:
        return _empty(batch, count, width, dtype=dtype)

    encoded = tokens(patches, width, batch), tokens(patches, width), ids_keep, tokens(1, width)
    grad = tokens(1 + keep, width, batch)
    yield "gather pos cls", partial(patch_gather.patch_gather, *encoded)
    yield "gather_backward pos cls", partial(_GATHER_BACKWARD, grad, ids_keep, patches, True, True)

    filler, pos = tokens(1, decoder_width), tokens(1 + patches, decoder_width)
    latent, grad = tokens(1 + keep, decoder_width, batch), tokens(1 + patches, decoder_width, batch)
    yield "scatter", partial(patch_scatter.patch_scatter, latent, filler, ids_restore, pos)
    yield "scatter_backward pos", partial(_SCATTER_BACKWARD, grad, ids_restore, keep, True)
    if shape is SHAPES["vit_l16"]:
        scores, kept = _empty(batch, patches, dtype=dtype), tokens(keep, width, batch)
        yield "select", partial(select_patches.select_patches, scores, keep)
        yield "gather", partial(patch_gather.patch_gather, encoded[0], None, ids_keep, None)
        yield "gather_backward", partial(_GATHER_BACKWARD, kept, ids_keep, patches, False, False)
        yield "scatter_backward", partial(_SCATTER_BACKWARD, grad, ids_restore, keep, False)


def _loss_cases(shape: Shape, dtype: torch.dtype) -> Iterator[tuple[str, Call]]:
    batch, size, patch = shape.batch, shape.image_size, shape.patch_size
    images, numbers = _empty(batch, 3, size, size), 3 * patch**2
    for name, which, weighted, norm_pix in (
        ("mask weights norm_pix", _empty(batch, shape.patches), True, True),
        ("ids", _ids(batch, shape.patches - shape.keep), False, False),
    ):
        one_each = _empty(*which.shape)
        pred = _empty(*which.shape, numbers, dtype=dtype)
        arguments = pred, images, which, one_each if weighted else None, patch, norm_pix
        yield f"loss {name}", partial(masked_patch_loss.masked_patch_loss, *arguments)
        yield f"loss_backward {name}", partial(_LOSS_BACKWARD, one_each, *arguments)


class _Driver:
    """As much of a driver as a compilation asks for."""

    def __init__(self, target: str) -> None:
        self._target = target

    def get_current_device(self) -> int:
        return list(TARGETS).index(self._target)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self._target]


@triton.jit
def _probe_kernel(x_ptr):
    tl.store(x_ptr, 1.0)


def usage(case: str, target: str) -> Usage:
    """Compiles what the case launches; it must be one kernel."""
    launches: list[Usage] = []

    def compile_only(kernel: Any, grid: tuple[int, ...], *args: object, **constants: object) -> None:
        compiled = kernel.warmup(*args, grid=grid, **constants)
        registers, spills = _registers(compiled.asm)
        threads = compiled.metadata.num_warps * TARGETS[target].warp_size
        processors = launch.DEFAULT_PROCESSORS
        programs = launch.ceil_div(math.prod(grid), processors)
        store = _narrowest_store(compiled.asm.get("ptx", ""))
        launches.append(Usage(registers, compiled.metadata.shared, spills, threads, programs, store))

    triton.runtime.driver.set_active(_Driver(target))
    with mock.patch.object(launch, "run", compile_only):
        cases()[case]()
    (result,) = launches
    return result


def unavailable(target: str) -> str | None:
    """Why nothing can be compiled for the target here, or None."""
    triton.runtime.driver.set_active(_Driver(target))
    try:
        _probe_kernel.warmup(_empty(1), grid=(1,))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _registers(asm: dict[str, Any]) -> tuple[int, int]:
    """(registers of a thread, bytes or registers that were spilled)."""
    if "amdgcn" in asm:
        # Scalar registers that do not fit go to vector registers, not to memory.
        used, spilled = (re.search(rf"\.{name}:\s+(\d+)", asm["amdgcn"]) for name in _AMD_COUNTS)
        if used is None or spilled is None:
            raise RuntimeError("amdgcn: no register counts")
        return int(used[1]), int(spilled[1])
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(asm["cubin"])
        command = [str(_CUOBJDUMP), "-res-usage", str(cubin)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage: unexpected output: {text}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _narrowest_store(ptx: str) -> int:
    stores = re.findall(r"st\.global(?:\.v(\d))?\.b(\d+)", ptx)
    return min((int(count or 1) * int(bits) // 8 for count, bits in stores), default=0)


def report() -> dict[str, Any]:
    """Everything, by target and case; the reason instead where a target is not available."""
    skipped = {target: reason for target in TARGETS if (reason := unavailable(target))}
    todo = [(case, target) for target in TARGETS if target not in skipped for case in cases()]
    workers = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        usages = list(pool.map(usage, *zip(*todo, strict=True), chunksize=4))
    found: dict[str, dict[str, Usage]] = {target: {} for target in TARGETS if target not in skipped}
    for (case, target), needs in zip(todo, usages, strict=True):
        found[target][case] = needs
    return {"triton": triton.__version__, "skipped": skipped, "usage": found}


def _write_record(found: dict[str, dict[str, Usage]]) -> None:
    """One line per case: registers and bytes of shared memory on every target."""
    lines = [
        f'  "{target}": {{\n'
        + ",\n".join(f'   "{case}": [{u.registers}, {u.shared}]' for case, u in sorted(entries.items()))
        + "\n  }"
        for target, entries in found.items()
    ]
    text = f'{{\n "triton": "{triton.__version__}",\n "registers and shared memory": {{\n'
    RECORD.write_text(text + ",\n".join(lines) + "\n }\n}\n")


def main() -> None:
    if launch.INTERPRETING:
        raise SystemExit("TRITON_INTERPRET is set: kernels would not be compiled")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help=f"rewrite {RECORD.name}")
    everything = report()
    if parser.parse_args().update:
        _write_record(everything["usage"])
    else:
        print(json.dumps(everything))


if __name__ == "__main__":
    main()
