"""The speed of everything on one GPU, in one command and in less than nine minutes.

    python benchmarks/gpu.py                 every part, with a record and pictures below benchmarks/results
    python benchmarks/gpu.py --quick         fewer shapes and variants
    python benchmarks/gpu.py --list          the parts
    python benchmarks/gpu.py --only NAMES    some of them: a,b,…
    python benchmarks/gpu.py --floor         no GPU: operations and bytes of a step, counted
    python benchmarks/gpu.py --smoke         no GPU: every part once on small shapes; times nothing
    python benchmarks/gpu.py --plots RECORD  draws the pictures of a record again

torch, triton and timm are needed; a part that misses another package is skipped with the reason. Each part
runs in a process of its own with a limited time, and the record is complete after every part. Exit code 1:
a bar is missed, or a part failed or ran out of time.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Loading torch for the first time counts too.
_STARTED = time.time()
ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    # Run as a script, the folder of this file comes first on the path and hides the package.
    sys.path[:1] = [str(ROOT), str(ROOT / "kernels")]

import torch

from benchmarks.environment import RESULTS, environment, slug
from benchmarks.gpu_parts import plots
from benchmarks.gpu_parts.catalogue import Part, choose
from benchmarks.gpu_parts.conductor import Setting, conduct
from benchmarks.gpu_parts.files import markdown, read_json
from benchmarks.gpu_parts.job import run_child
from benchmarks.gpu_parts.record import Record

SECONDS = 530
# For pictures and the summary, at the end.
_LAST_SECONDS = 15
# The rest is for contexts and what the allocators cannot use.
_SHARE_OF_MEMORY = 0.95


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    if options.child is not None:
        code = run_child(options.child)
        sys.stdout.flush()
        # The compiler's threads need not agree that this is the end.
        os._exit(code)
    try:
        parts = choose(options.only)
    except ValueError as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return 2
    if options.list:
        print(markdown([_described(part) for part in parts]))
        return 0
    if options.floor:
        from benchmarks.gpu_parts.floors import show

        show()
        return 0
    if options.plots is not None:
        return _draw_again(options.plots)
    if not options.smoke and not torch.cuda.is_available():
        print(
            "gpu.py: found no CUDA device; --smoke runs everything once without one, --floor counts",
            file=sys.stderr,
        )
        return 2
    words = shlex.join(["python", "benchmarks/gpu.py", *(sys.argv[1:] if argv is None else argv)])
    return _run(options, parts, words)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer shapes and variants")
    parser.add_argument("--smoke", action="store_true", help="run everything once, without a GPU")
    parser.add_argument("--only", metavar="NAMES", help="parts to run: a,b,…")
    parser.add_argument("--list", action="store_true", help="list the parts")
    parser.add_argument("--floor", action="store_true", help="count the least work of a step; no GPU")
    parser.add_argument("--out", type=Path, metavar="DIR", help="instead of benchmarks/results")
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="S", help="for everything")
    parser.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="parts that prepare at once; with 1 nothing disturbs the compiler, which times some kernels",
    )
    parser.add_argument("--plots", type=Path, metavar="RECORD", help="draw a record's pictures again")
    # A part, from within.
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _run(options: argparse.Namespace, parts: Sequence[Part], command: str) -> int:
    device = "cpu" if options.smoke else torch.cuda.get_device_name()
    if options.smoke:
        # Parts of one module differ in the size of the model, and a smoke run has one size.
        parts = list({part.module: part for part in parts}.values())
    stamp = f"{datetime.now(UTC):%Y-%m-%dT%H%M%SZ}"
    with tempfile.TemporaryDirectory(prefix="gpu-benchmark-") as scratch:
        chosen = options.out or (Path(scratch) if options.smoke else RESULTS)
        folder = chosen.resolve() / slug(device)
        folder.mkdir(parents=True, exist_ok=True)
        record = Record(folder / f"{stamp}_gpu.json", _head(device, command, options))
        setting = Setting(
            device="cpu" if options.smoke else "cuda",
            smoke=options.smoke,
            quick=options.quick,
            out=folder,
            stamp=stamp,
            end=_STARTED + options.seconds - _LAST_SECONDS,
            gigabytes=1e9 if options.smoke else _memory(),
            processes=options.processes,
            scratch=Path(scratch),
        )
        # A time limit from outside ends this process politely first: keep what there is.
        signal.signal(signal.SIGTERM, _stop)
        try:
            conduct(parts, setting, record.add)
        finally:
            record.note("gpu_after", _gpu_state(options.smoke))
            record.note("seconds", round(time.time() - _STARTED, 1))
            print(f"\n{record.summary()}\n", flush=True)
            print(_verdict(record, options.smoke), flush=True)
            _draw(record, folder, stamp)
    return 0 if record.good else 1


def _stop(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(1)


def _head(device: str, command: str, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "benchmark": "gpu",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "smoke": options.smoke,
        "quick": options.quick,
        **environment(device),
        "gpu": _gpu_state(options.smoke),
    }


def _memory() -> float:
    """Gigabytes that parts may take together."""
    return _SHARE_OF_MEMORY * torch.cuda.get_device_properties(0).total_memory / 1e9


def _gpu_state(smoke: bool) -> str | None:
    """Driver, clocks, power and temperature, as the driver's own tool tells them; None without it."""
    if smoke:
        return None
    query = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return " ".join(done.stdout.split()) or None


def _draw(record: Record, folder: Path, stamp: str) -> None:
    try:
        problems = plots.draw(record.content, folder, stamp)
    except ImportError as error:
        problems = [f"none: {error}"]
    if problems:
        record.note("pictures_left_out", problems)
        print(f"pictures: {'; '.join(problems)}", flush=True)


def _draw_again(path: Path) -> int:
    content = read_json(path)
    if content is None:
        print(f"gpu.py: --plots: {path} does not exist", file=sys.stderr)
        return 2
    problems = plots.draw(content, path.parent, path.stem.partition("_")[0])
    print(json.dumps(problems) if problems else f"drawn beside {path.name}")
    return 1 if problems else 0


def _verdict(record: Record, smoke: bool) -> str:
    assert record.path is not None
    if smoke:
        return "smoke run: nothing was timed" + ("" if record.good else "; SOMETHING FAILED, see above")
    missed = [bar["what"] for bar in record.content["bars"] if bar["met"] is False]
    skipped = [name for name, part in record.content["parts"].items() if part["status"] == "skipped"]
    bars = f"{len(missed)} of {len(record.content['bars'])} bars missed; {len(skipped)} parts skipped"
    return f"{bars}; {record.content['seconds']:.0f} s; recorded {record.path.parent.name}/{record.path.name}"


def _described(part: Part) -> dict[str, str | float]:
    return {
        "part": part.name,
        "about": part.about,
        "prepare, s": part.prepare,
        "measure, s": part.measure,
        "GB": part.gigabytes,
    }


if __name__ == "__main__":
    sys.exit(main())
