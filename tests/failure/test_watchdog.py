"""When a rank comes to an end, the others end in time, with its name, place and the right exit code."""

from __future__ import annotations

import re
import signal
import socket
import threading
from pathlib import Path

import pytest
import torch

from mlomae.arguments import EXIT_LOST, EXIT_PREEMPTED, EXIT_PROBLEMS, EXIT_USER_ERROR
from mlomae.distributed.env import World
from mlomae.distributed.watchdog import Watchdog
from mlomae.errors import LostRank
from tests.failure.endings import LAST, LOST_AFTER, PAUSE, STUCK_AFTER, run_until

pytestmark = [pytest.mark.dist, pytest.mark.slow]

HOST = re.escape(socket.gethostname())
SEEN = r"last seen in iteration [0-5], (data|pretrain/descend)"
AGAIN = "; start again to resume from the last checkpoint"
# From the start to the end of a rank, and from the moment of a verdict to exit, with room for a busy machine.
BEFORE, ROOM = LAST * PAUSE, 45.0


@pytest.mark.parametrize(
    ("end", "victim", "after", "code", "line"),
    [
        ("killed", 1, 0, EXIT_LOST, f"is lost: the process ended without a word; {SEEN}{AGAIN}"),
        ("killed", 0, 0, EXIT_LOST, f"is lost: the process ended without a word; {SEEN}{AGAIN}"),
        ("paused", 1, LOST_AFTER, EXIT_LOST, f"is lost: no sign of life for 3 s; {SEEN}{AGAIN}"),
        ("paused", 0, LOST_AFTER, EXIT_LOST, f"is lost: no sign of life for 3 s; {SEEN}{AGAIN}"),
        ("refused", 1, 0, EXIT_USER_ERROR, f"has stopped: data.root: cannot be read; {SEEN}"),
        ("wrong", 0, 0, EXIT_PROBLEMS, f"has stopped: ZeroDivisionError: division by zero; {SEEN}"),
        ("preempted", 1, 0, EXIT_PREEMPTED, f"has stopped: it was asked to; {SEEN}{AGAIN}"),
        (
            "stuck", 1, STUCK_AFTER, EXIT_LOST,
            r"is stuck: no progress for 5 s \(failure.stuck_after\); last seen in iteration 5, data, others "
            f"in iteration 5, pretrain/descend{AGAIN}",
        ),
    ],
)  # fmt: skip
def test_the_others_name_the_rank_and_end(
    end: str, victim: int, after: float, code: int, line: str, tmp_path: Path
) -> None:
    ranks = run_until(end, victim, 3, tmp_path)

    others = [rank for number, rank in enumerate(ranks) if number != victim]
    assert [rank.code for rank in others] == [code, code], ranks
    # One speaks for the host.
    (said,) = [line for rank in others for line in rank.said]
    assert re.fullmatch(f"mlomae: error: rank {victim} on {HOST} {line}", said)
    for rank in others:
        # The last sign of life is up to a second old when the rank ends.
        assert BEFORE + after - 1 <= rank.seconds < BEFORE + after + ROOM
    expected = {"killed": -signal.SIGKILL, "paused": -signal.SIGKILL}.get(end, code)
    assert ranks[victim].code == expected


def test_a_rank_that_wakes_up_too_late_ends_as_the_others_did(tmp_path: Path) -> None:
    ranks = run_until("resumed", 1, 2, tmp_path)
    assert [rank.code for rank in ranks] == [EXIT_LOST, EXIT_LOST]
    assert len(ranks[0].said) == 1


def test_a_slow_rank_is_not_lost(tmp_path: Path) -> None:
    ranks = run_until("slow", 1, 2, tmp_path)
    assert [(rank.code, rank.said) for rank in ranks] == [(0, []), (0, [])]


def test_one_rank_has_nobody_to_watch() -> None:
    with pytest.raises(ValueError, match="own"), Watchdog(World(0, 1, torch.device("cpu")), 1.0, 1.0):
        raise ValueError("its own")


def test_a_broken_message_ends_the_run_also_where_nobody_is_to_blame() -> None:
    watchdog = Watchdog(World(0, 2, torch.device("cpu")), lost_after=0.1, stuck_after=1.0)
    watchdog._thread = threading.Thread(target=lambda: None)
    watchdog._thread.start()
    error = RuntimeError("[pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed")

    with pytest.raises(LostRank, match=r"none of them is known to be lost .*Connection closed"):
        watchdog.__exit__(RuntimeError, error, None)
