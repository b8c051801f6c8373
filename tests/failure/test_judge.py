"""Verdicts on ranks, from what they said and when."""

from __future__ import annotations

import pytest

from mlomae.arguments import EXIT_LOST, EXIT_OK, EXIT_PREEMPTED, EXIT_USER_ERROR
from mlomae.distributed.judge import Judge, Place, Verdict

HOSTS = ["a", "a", "b", "b"]
AGAIN = "; start again to resume from the last checkpoint"
DATA, FORWARD = Place(7, 1, "data"), Place(7, 2, "pretrain/forward")


def judge_of(rank: int = 0, watched: range = range(4)) -> Judge:
    return Judge(rank, HOSTS, watched, lost_after=10, stuck_after=100, now=0.0)


def hear(judge: Judge, now: float, places: dict[int, Place]) -> None:
    for rank, place in places.items():
        judge.heard(rank, place, now)


def found(verdict: Verdict | None) -> tuple[str, int, list[int]]:
    assert verdict is not None
    assert "\n" not in verdict.line
    return verdict.line.removesuffix(AGAIN), verdict.code, verdict.culprits


def test_silence_counts_from_the_last_word() -> None:
    judge = judge_of()
    hear(judge, 5.0, dict.fromkeys(range(4), DATA))
    hear(judge, 14.0, {0: FORWARD, 2: FORWARD, 3: FORWARD})
    assert judge.verdict(14.9) is None

    line = "rank 1 on a is lost: no sign of life for 10 s; last seen in iteration 7, data"
    assert found(judge.verdict(15.0)) == (line, EXIT_LOST, [1])


def test_a_rank_that_never_spoke_is_lost_too() -> None:
    judge = judge_of()
    hear(judge, 9.0, {1: DATA, 3: DATA})
    line = "rank 2 on b is lost: no sign of life for 10 s; last seen before the first iteration, start"
    assert found(judge.verdict(10.0)) == (line, EXIT_LOST, [2])


def test_a_rank_does_not_wait_for_its_own_word() -> None:
    judge = judge_of()
    hear(judge, 50.0, {1: DATA, 2: DATA, 3: DATA})
    assert judge.verdict(50.0) is None


def test_where_all_other_hosts_are_silent_the_own_one_may_be_cut_off() -> None:
    judge = judge_of()
    hear(judge, 5.0, dict.fromkeys(range(4), DATA))
    hear(judge, 15.0, {1: DATA})
    line, _, culprits = found(judge.verdict(15.0))
    assert line.startswith(
        "rank 2 on b and 1 more are lost: no sign of life for 10 s, or a is cut off from the "
    )
    assert culprits == [2, 3]

    other = judge_of(rank=3, watched=range(1))
    line, _, culprits = found(other.verdict(10.0))
    assert line.startswith("rank 0 on a is lost: no sign of life for 10 s, or b is cut off from the network;")


def test_an_end_without_a_word_is_noticed_at_once() -> None:
    judge = judge_of()
    hear(judge, 1.0, {3: DATA})
    judge.closed(3)
    line = "rank 3 on b is lost: the process ended without a word; last seen in iteration 7, data"
    assert found(judge.verdict(1.0)) == (line, EXIT_LOST, [3])


@pytest.mark.parametrize("code", [EXIT_USER_ERROR, EXIT_LOST, EXIT_PREEMPTED])
def test_a_rank_that_left_is_missed_once_others_wait_for_it(code: int) -> None:
    judge = judge_of()
    hear(judge, 5.0, {1: DATA})
    judge.ended(1, code, "data.root: is empty", 5.0)
    judge.closed(1)
    for now in (5.0, 14.9):
        hear(judge, now, dict.fromkeys((0, 2, 3), Place(8, int(now), "data")))
        assert judge.verdict(now) is None

    expected = ("rank 1 on a has stopped: data.root: is empty; last seen in iteration 7, data", code, [1])
    assert found(judge.verdict(15.0)) == expected
    assert found(judge.verdict(5.0, broken=True)) == expected
    # A launcher kills the others when one leaves.
    judge.closed(2)
    assert found(judge.verdict(5.0)) == expected


def test_bad_input_is_not_to_be_started_again() -> None:
    judge = judge_of()
    judge.ended(1, EXIT_USER_ERROR, "data.root: is empty", 0.0)
    verdict = judge.verdict(0.0, broken=True)
    assert verdict is not None and AGAIN not in verdict.line


def test_a_rank_that_has_finished_is_missed_only_where_a_message_to_it_failed() -> None:
    judge = judge_of()
    judge.ended(1, EXIT_OK, "it has finished", 1.0)
    judge.closed(1)
    assert judge.verdict(2.0) is None
    line = "rank 1 on a has stopped: it has finished; last seen before the first iteration, start"
    assert found(judge.verdict(2.0, broken=True)) == (line, EXIT_LOST, [1])
    # Another one that dies is the one to name.
    judge.closed(2)
    line = (
        "rank 2 on b is lost: the process ended without a word; last seen before the first iteration, start"
    )
    assert found(judge.verdict(2.0)) == (line, EXIT_LOST, [2])


def test_the_last_rank_may_work_alone() -> None:
    judge = judge_of()
    for rank in (1, 2, 3):
        judge.ended(rank, EXIT_OK, "it has finished", 1.0)
        judge.closed(rank)
    assert judge.verdict(1e6) is None


def test_the_rank_that_the_others_wait_for_is_stuck() -> None:
    judge = judge_of()
    hear(judge, 5.0, {0: FORWARD, 1: FORWARD, 2: DATA, 3: FORWARD})
    hear(judge, 104.9, {0: FORWARD, 1: FORWARD, 2: DATA, 3: FORWARD})
    assert judge.verdict(104.9) is None

    line = (
        "rank 2 on b is stuck: no progress for 100 s (failure.stuck_after); last seen in iteration 7, data, "
        "others in iteration 7, pretrain/forward"
    )
    assert found(judge.verdict(105.0)) == (line, EXIT_LOST, [2])


def test_progress_of_one_rank_is_enough() -> None:
    judge = judge_of()
    for now in range(0, 300, 5):
        hear(judge, now, {0: FORWARD, 1: FORWARD, 2: Place(7, now, "data"), 3: FORWARD})
        assert judge.verdict(now) is None


def test_ranks_at_the_same_place_are_stuck_together() -> None:
    judge = judge_of()
    for now in (5.0, 105.0):
        hear(judge, now, dict.fromkeys(range(4), FORWARD))
    line = (
        "all ranks are stuck: no progress for 100 s (failure.stuck_after), last seen in iteration 7, "
        "pretrain/forward"
    )
    assert found(judge.verdict(105.0)) == (line, EXIT_LOST, [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("culprits", "speakers"), [([1], [0, 2]), ([0], [1, 2]), ([0, 1, 2], [0, 3]), ([0, 1, 2, 3], [0, 2])]
)
def test_one_rank_of_each_host_speaks(culprits: list[int], speakers: list[int]) -> None:
    verdict = Verdict("", EXIT_LOST, culprits)
    assert [rank for rank in range(4) if judge_of(rank).speaks(verdict)] == speakers
