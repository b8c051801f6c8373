"""Plain MAE pretraining steps of our trainer against transformers and against a program of timm's blocks."""

from __future__ import annotations

import statistics

import pytest

from benchmarks.peers.problem import SIZES
from benchmarks.peers.processes import Found, ratio, require_packages, run_peer, wall
from benchmarks.report import Bar, Report

pytestmark = pytest.mark.study

SIZE = "vit-b16"
PEERS: dict[str, tuple[str, ...]] = {
    "ours": ("ours_peer", "--variant", "plain"),
    "transformers": ("vitmae_peer",),
    "timm, eager": ("timm_peer",),
}
MIN_SPEED_UP = 1.3


def test_plain_mae(report: Report, request: pytest.FixtureRequest) -> None:
    require_packages("transformers")
    smoke = request.config.getoption("iterations")
    size = SIZES[SIZE]
    processes, rounds = (size.processes, size.rounds) if smoke is None else (1, smoke)
    found: dict[str, list[Found]] = {peer: [] for peer in PEERS}
    for process in range(processes):
        # In turn, so that a change in the machine's load meets all of them.
        for peer, runs in found.items():
            runs.append(
                run_peer(PEERS[peer], SIZE, "--rounds", str(rounds), *(() if process else ("--flops",)))
            )
    steps = 2  # of an outer iteration
    report.table(
        f"plain MAE step, ViT-B/16, 224x224, batch {size.batch}, float32, on the CPU; "
        f"{processes} processes of {rounds} rounds each, medians",
        [
            {
                "peer": peer,
                "wall, s": wall(runs) / steps,
                "CPU, s": statistics.median(s for run in runs for s in run["cpu"]) / steps,
                "images/s": steps * size.batch / wall(runs),
                "GFLOP": runs[0]["flops"] / steps / 1e9,
                "GFLOP/s": runs[0]["flops"] / wall(runs) / 1e9,
                "ours is faster by": ratio(runs, found["ours"]),
            }
            for peer, runs in found.items()
        ],
    )
    if smoke is None:
        bars = [
            Bar(f"wall, {peer} / ours", ratio(runs, found["ours"]), ">=", MIN_SPEED_UP)
            for peer, runs in found.items()
            if peer != "ours"
        ]
        report.check(*bars)
