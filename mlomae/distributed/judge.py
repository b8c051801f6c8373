"""Decides from signs of life whether a rank is lost, has stopped or is stuck, and says so in one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from mlomae.arguments import EXIT_LOST, EXIT_OK, EXIT_PREEMPTED

_RESUME = "; start again to resume from the last checkpoint"


class Place(NamedTuple):
    """A position in a run, ordered by time; see ``mlomae.ranges.Position``."""

    iteration: int
    number: int
    part: str

    def __str__(self) -> str:
        if self.iteration < 0:
            return f"before the first iteration, {self.part}"
        return f"in iteration {self.iteration}, {self.part}"


@dataclass(frozen=True)
class Verdict:
    """The end of a run.

    Attributes:
        line: what happened, for the user.
        code: exit code for the ranks that still run.
        culprits: the ranks that it names, and those in the same state.
    """

    line: str
    code: int
    culprits: list[int]


@dataclass(frozen=True)
class _Peer:
    """What is known of a rank; times by this process's clock.

    Attributes:
        ended: exit code and reason of a rank that said that it leaves.
        ended_at: when it said so.
        closed: its connection is closed.
    """

    rank: int
    host: str
    place: Place
    heard: float
    moved: float
    ended: tuple[int, str] | None = None
    ended_at: float = 0.0
    closed: bool = False

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


class Judge:
    """Watches some ranks, of which it is told what they say.

    Args:
        rank: this process's.
        hosts: names of the hosts of all ranks.
        watched: the ranks to watch; with this one among them, also whether all of them are stuck.
        lost_after: seconds of silence.
        stuck_after: seconds without progress of any rank.
        now: seconds, by any clock that runs on.
    """

    def __init__(
        self,
        rank: int,
        hosts: Sequence[str],
        watched: Sequence[int],
        lost_after: float,
        stuck_after: float,
        now: float,
    ) -> None:
        self._rank = rank
        self._hosts = hosts
        self._lost_after = lost_after
        self._stuck_after = stuck_after
        start = Place(-1, 0, "start")
        self._peers = {peer: _Peer(peer, hosts[peer], start, now, now) for peer in watched}

    def heard(self, rank: int, place: Place, now: float) -> None:
        """A sign of life."""
        peer = self._peers[rank]
        moved = now if place != peer.place else peer.moved
        self._peers[rank] = replace(peer, place=place, heard=now, moved=moved)

    def ended(self, rank: int, code: int, reason: str, now: float) -> None:
        """A rank says that it leaves with this exit code."""
        self._peers[rank] = replace(self._peers[rank], ended=(code, reason), ended_at=now)

    def closed(self, rank: int) -> None:
        """A rank's connection has ended: so has its process, unless it said that it leaves."""
        self._peers[rank] = replace(self._peers[rank], closed=True)

    def speaks(self, verdict: Verdict) -> bool:
        """Whether this rank prints the verdict: on each host, the lowest rank that is not to blame."""
        own = [rank for rank, host in enumerate(self._hosts) if host == self._hosts[self._rank]]
        innocent = [rank for rank in own if rank not in verdict.culprits]
        return self._rank == min(innocent or own)

    def verdict(self, now: float, broken: bool = False) -> Verdict | None:
        """The end of the run, if it has come.

        Args:
            broken: a collective has failed, so that a rank that left is missed.
        """
        running = [peer for peer in self._peers.values() if not peer.ended]
        dead = [peer for peer in running if peer.closed]
        left = [peer for peer in self._peers.values() if self._missed(peer, now, broken, bool(dead))]
        if left:
            # Before those that died: a launcher kills the others when one leaves.
            first = min(left, key=lambda peer: peer.ended_at)
            assert first.ended is not None
            code, reason = first.ended
            code = code or EXIT_LOST
            again = _RESUME if code in (EXIT_LOST, EXIT_PREEMPTED) else ""
            line = f"{first} has stopped: {reason}; last seen {first.place}{again}"
            return Verdict(line, code, [first.rank])
        if dead:
            return self._lost(dead, "the process ended without a word")
        silent = [
            peer for peer in running if peer.rank != self._rank and now - peer.heard >= self._lost_after
        ]
        if silent:
            return self._lost(silent, f"no sign of life for {self._lost_after:g} s{self._or_cut_off(silent)}")
        if self._rank in self._peers and len(running) > 1:
            return self._stuck(running, now)
        return None

    def _missed(self, peer: _Peer, now: float, broken: bool, died: bool) -> bool:
        """Whether a rank that has left keeps this one waiting.

        Errors that all ranks meet together let each of them leave on its own, in its time. One that has
        finished is missed where a message to it failed, and not because another one died.
        """
        if peer.ended is None:
            return False
        code, _ = peer.ended
        if broken or code == EXIT_OK:
            return broken
        return died or now - peer.ended_at >= self._lost_after

    def _lost(self, lost: list[_Peer], reason: str) -> Verdict:
        first = min(lost, key=lambda peer: (peer.place, peer.rank))
        line = f"{_names(first, lost)} lost: {reason}; last seen {first.place}{_RESUME}"
        return Verdict(line, EXIT_LOST, [peer.rank for peer in lost])

    def _or_cut_off(self, silent: list[_Peer]) -> str:
        here = self._hosts[self._rank]
        away = {peer.rank for peer in self._peers.values() if peer.host != here}
        cut_off = away and away == {peer.rank for peer in silent}
        return f", or {here} is cut off from the network" if cut_off else ""

    def _stuck(self, running: list[_Peer], now: float) -> Verdict | None:
        if now - max(peer.moved for peer in running) < self._stuck_after:
            return None
        first = min(running, key=lambda peer: (peer.place, peer.rank))
        behind = [peer for peer in running if peer.place[:2] == first.place[:2]]
        since = f"no progress for {self._stuck_after:g} s (failure.stuck_after)"
        culprits = [peer.rank for peer in behind]
        if len(behind) == len(running):
            line = f"all ranks are stuck: {since}, last seen {first.place}{_RESUME}"
            return Verdict(line, EXIT_LOST, culprits)
        others = max(running, key=lambda peer: peer.place).place
        line = f"{_names(first, behind)} stuck: {since}; last seen {first.place}, others {others}{_RESUME}"
        return Verdict(line, EXIT_LOST, culprits)


def _names(first: _Peer, peers: list[_Peer]) -> str:
    more = len(peers) - 1
    return f"{first} and {more} more are" if more else f"{first} is"
