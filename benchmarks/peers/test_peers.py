"""What an outer iteration costs in our trainer, in betty-ml, and beside plain MAE steps."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import pytest

from benchmarks.peers.problem import SIZES
from benchmarks.peers.processes import Found, ratio, require_packages, run_peer, wall
from benchmarks.report import Bar, Report, Row

pytestmark = pytest.mark.study

# Name in the tables → module and its arguments. In this order within a round.
PEERS: dict[str, tuple[str, ...]] = {
    "ours, full": ("ours_peer", "--variant", "full"),
    "betty": ("betty_peer",),
    "ours, default": ("ours_peer", "--variant", "default"),
    "ours, plain MAE": ("ours_peer", "--variant", "plain"),
    "transformers, plain MAE": ("vitmae_peer",),
}
MULTILEVEL = ("ours, full", "ours, default", "betty")

MIN_SPEED_UP = {"ours, full": 1.5, "ours, default": 2.4}
MAX_PEAK = 0.65
MAX_OVER_PLAIN = {"ours, full": 3.4, "ours, default": 2.0}
# glibc keeps freed blocks for later, which counts as resident. Told to return them at once, it is slower
# and its resident set is what lives, as a GPU's allocator would count it.
_RETURN_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def _row(peer: str, runs: Sequence[Found], lean: Found, batch: int) -> Row:
    flops = runs[0]["flops"]
    package = [f"{name} {version}" for name, version in runs[0]["versions"].items() if name != "torch"]
    return {
        "per outer iteration": peer,
        "wall, s": wall(runs),
        "CPU, s": statistics.median(seconds for run in runs for seconds in run["cpu"]),
        "GFLOP": flops / 1e9,
        "GFLOP/sample": flops / 1e9 / batch,
        "peak, MiB": lean["peak"] / 2**20,
        "resident, MiB": statistics.median(run["peak"] for run in runs) / 2**20,
        "package": ", ".join(package) or None,
    }


def _bars(found: dict[str, list[Found]], lean: dict[str, Found]) -> list[Bar]:
    betty, plain = found["betty"], found["ours, plain MAE"]
    return [
        *(
            Bar(f"wall, betty / {peer}", ratio(betty, found[peer]), ">=", bound)
            for peer, bound in MIN_SPEED_UP.items()
        ),
        Bar(
            "peak memory, ours, full / betty",
            lean["ours, full"]["peak"] / lean["betty"]["peak"],
            "<=",
            MAX_PEAK,
        ),
        *(
            Bar(f"wall, {peer} / as many plain MAE steps", ratio(found[peer], plain), "<=", bound)
            for peer, bound in MAX_OVER_PLAIN.items()
        ),
    ]


@pytest.mark.parametrize("size", ["tiny", "vit-b"])
def test_peers(size: str, report: Report, request: pytest.FixtureRequest) -> None:
    require_packages("betty", "transformers")
    smoke = request.config.getoption("iterations")
    chosen = SIZES[size]
    processes, rounds = (chosen.processes, chosen.rounds) if smoke is None else (1, smoke)
    found: dict[str, list[Found]] = {peer: [] for peer in PEERS}
    for process in range(processes):
        # In turn, so that a change in the machine's load meets all of them.
        for peer, runs in found.items():
            counted = () if process else ("--flops",)
            runs.append(run_peer(PEERS[peer], size, "--rounds", str(rounds), *counted))

    lean = {peer: run_peer(PEERS[peer], size, "--memory", environment=_RETURN_AT_ONCE) for peer in PEERS}

    unmoved = [peer for peer in MULTILEVEL for run in found[peer] if not run["mask_moved"]]
    assert not unmoved, f"the masking network did not learn: {unmoved}"
    plain = found["ours, plain MAE"]
    report.table(
        f"{size}: {_describe(size)}, {processes} processes of {rounds} rounds each, medians",
        [
            {**_row(peer, runs, lean[peer], chosen.batch), "x plain MAE": ratio(runs, plain)}
            for peer, runs in found.items()
        ],
    )
    if smoke is None:
        report.check(*_bars(found, lean))


def _describe(size: str) -> str:
    chosen = SIZES[size]
    arch, patch = chosen.overrides["model.arch"], chosen.overrides["model.patch_size"]
    return f"{arch}, 32x32, patch {patch}, batch {chosen.batch}, token masking network, on the CPU"
