"""Two hosts, as network namespaces of this machine: a run across both, and their link goes down."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlomae.arguments import EXIT_LOST
from tests.integration.tiny import FEW_TO_FIT, read_metrics, tiny_config, train, write_recipe

pytestmark = [pytest.mark.dist, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 240
LOST_AFTER = 3
LOSSES = ("loss/pretrain", "loss/head", "loss/mask")
# Names of interfaces are short: the process's number tells those of several test runs apart.
HOSTS = tuple(f"mlo{end}{os.getpid()}" for end in "ab")
ADDRESSES = ("10.213.7.1", "10.213.7.2")


def ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, ...]]:
    """Names of two hosts with a link between them; the interface of each has its name."""
    if os.geteuid() or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("network namespaces need root, ip and unshare")
    try:
        ip(f"netns add {HOSTS[0]}")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not allowed here ({error.stderr.strip()})")
    try:
        ip(f"netns add {HOSTS[1]}")
        ip(f"link add {HOSTS[0]} netns {HOSTS[0]} type veth peer name {HOSTS[1]} netns {HOSTS[1]}")
        for host, address in zip(HOSTS, ADDRESSES, strict=True):
            ip(f"-n {host} addr add {address}/24 dev {host}")
            ip(f"-n {host} link set {host} up")
            ip(f"-n {host} link set lo up")
        yield HOSTS
    finally:
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", host], capture_output=True)


def start(rank: int, recipe: Path, run_dir: Path) -> subprocess.Popen[str]:
    """A rank on the host of its number."""
    host = HOSTS[rank]
    on_host = [
        "ip",
        "netns",
        "exec",
        host,
        "unshare",
        "--uts",
        "sh",
        "-c",
        f'hostname {host}; exec "$@"',
        "sh",
    ]
    variables = {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": ADDRESSES[0],
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": host,
        "OMP_NUM_THREADS": "1",
    }
    train_py = [str(ROOT / "train.py"), "--config", str(recipe), "--run-dir", str(run_dir)]
    return subprocess.Popen(
        [*on_host, sys.executable, *train_py], env={**os.environ, **variables}, cwd=recipe.parent,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_run_across_hosts_equals_one_process(hosts: tuple[str, ...], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "tiny.yaml", FEW_TO_FIT)
    ranks = [start(rank, recipe, tmp_path / "run") for rank in (0, 1)]
    said = [rank.communicate(timeout=TIMEOUT)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said

    train(tiny_config({**FEW_TO_FIT, "run_dir": tmp_path / "whole"}))
    found, whole = read_metrics(tmp_path / "run"), read_metrics(tmp_path / "whole")
    for row, expected in zip(found, whole, strict=True):
        assert [row[name] for name in LOSSES] == pytest.approx([expected[name] for name in LOSSES], abs=1e-5)


def test_a_link_that_goes_down_ends_both_sides(hosts: tuple[str, ...], tmp_path: Path) -> None:
    fields = {"iterations": 10**6, "checkpoint_every": 10**6, "failure.lost_after": LOST_AFTER}
    recipe = write_recipe(tmp_path / "tiny.yaml", fields)
    ranks = [start(rank, recipe, tmp_path / "run") for rank in (0, 1)]
    try:
        metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + TIMEOUT
        while not (metrics.exists() and metrics.read_text().count("\n") > 50):
            assert time.monotonic() < deadline and ranks[0].poll() is None
            time.sleep(0.1)
        ip(f"-n {hosts[0]} link set {hosts[0]} down")
        down = time.monotonic()
        said = [rank.communicate(timeout=TIMEOUT)[1] for rank in ranks]
        # Silence, a look, and last words that nobody hears; twice that for a busy machine.
        assert time.monotonic() - down < 2 * (LOST_AFTER + 5)
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [EXIT_LOST] * 2
    for rank, other in ((0, 1), (1, 0)):
        expected = (
            f"mlomae: error: rank {other} on {hosts[other]} is lost: no sign of life for 3 s, or "
            rf"{hosts[rank]} is cut off from the network; last seen in iteration \d+, [\w/]+; "
            "start again to resume from the last checkpoint"
        )
        # torch warns that these hosts have no names in the network.
        (line,) = [line for line in said[rank].splitlines() if not line.startswith("[W")]
        assert re.fullmatch(expected, line)
