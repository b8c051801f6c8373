"""Ends this process when another rank is lost, has stopped or is stuck, instead of waiting for it for ever.

Every rank tells rank 0 where it is, and rank 0 tells every rank that it lives: once a second, from a thread,
whatever the main thread does. Rank 0 judges all ranks and passes its verdict on; the others judge rank 0.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch.distributed as dist

from mlomae.arguments import (
    EXIT_INTERRUPTED,
    EXIT_LOST,
    EXIT_OK,
    EXIT_PREEMPTED,
    EXIT_PROBLEMS,
    EXIT_USER_ERROR,
)
from mlomae.distributed import collectives
from mlomae.distributed.env import World
from mlomae.distributed.judge import Judge, Place, Verdict
from mlomae.distributed.wire import Message, Wire, connect, listen
from mlomae.errors import Interrupted, LostRank, Preempted, UserError
from mlomae.ranges import position

# Seconds between signs of life, between looks, and for the last words.
_BEAT, _TICK, _LINGER = 1.0, 0.25, 3.0


class _AwakeClock:
    """Seconds during which this process ran: after a pause of its own, all others seem to have paused."""

    def __init__(self) -> None:
        self.now = 0.0
        self._last = time.monotonic()

    def tick(self) -> None:
        moment = time.monotonic()
        self.now += min(moment - self._last, 2 * _BEAT)
        self._last = moment


class Watchdog:
    """Watches the other ranks while its block runs; entered by all ranks together.

    If one of them is lost (killed, stopped, its host gone), has left with an error while this one waits for
    it, or if no rank makes progress, it prints one line and ends the process, whatever its main thread does:
    with ``EXIT_LOST``, or with the exit code of the rank that left. The line is printed once per host. One
    rank alone has nobody to watch.

    Args:
        world: with the process group joined.
        lost_after: seconds of silence after which a rank counts as lost. A process that dies on a living
            host is noticed at once.
        stuck_after: seconds without progress of any rank (``mlomae.ranges.position``) after which those
            behind count as stuck.

    Attributes:
        before_end: called in the thread before it ends the process; has to come to an end itself.

    Raises:
        UserError: on entering, where rank 0 cannot be reached.
        LostRank: on leaving, where a collective failed and nobody is to blame.
    """

    def __init__(self, world: World, lost_after: float, stuck_after: float) -> None:
        self._world = world
        self._lost_after = lost_after
        self._stuck_after = stuck_after
        self._broken = False
        self._leaving: tuple[int, str] | None = None
        self._thread: threading.Thread | None = None
        self.before_end: Callable[[], object] | None = None

    def __enter__(self) -> Watchdog:
        world = self._world
        if world.size == 1:
            return self
        names = collectives.broadcast_object(collectives.gather_object(socket.gethostname()))
        assert names is not None
        wire, place = listen(os.environ["MASTER_ADDR"]) if world.primary else (None, None)
        place = collectives.broadcast_object(place)
        if wire is None:
            assert place is not None
            wire = connect(place, world.rank, self._lost_after)
        watched = range(world.size) if world.primary else [0]
        clock = _AwakeClock()
        judge = Judge(world.rank, names, watched, self._lost_after, self._stuck_after, clock.now)
        self._thread = threading.Thread(
            target=self._watch, args=(wire, judge, clock), name="watchdog", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        if _is_broken_collective(error):
            # The thread ends the process as soon as it is clear who is missing.
            self._broken = True
            _join(self._thread, self._lost_after + _LINGER)
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            error = LostRank(
                f"a message between ranks failed, and none of them is known to be lost ({reason}); "
                "start again to resume from the last checkpoint"
            )
            self._leaving = _ending(error)
            _join(self._thread, 2 * _LINGER)
            raise error from None
        self._leaving = _ending(error)
        _join(self._thread, 2 * _LINGER)

    def _watch(self, wire: Wire, judge: Judge, clock: _AwakeClock) -> None:
        spoken = -_BEAT
        while self._leaving is None:
            clock.tick()
            if clock.now - spoken >= _BEAT:
                spoken = clock.now
                wire.send(self._beat())
            if self._world.primary:
                judge.heard(0, _place(self._beat()), clock.now)
            for rank, message in wire.poll(_TICK):
                self._take(judge, rank, message, clock.now)
            verdict = judge.verdict(clock.now, self._broken)
            if verdict is not None and self._leaving is None:
                wire.send({"verdict": vars(verdict)})
                self._end(judge, verdict, wire)
        code, reason = self._leaving
        wire.send({**self._beat(), "ended": [code, reason]})
        wire.finish(_LINGER)

    def _beat(self) -> Message:
        place = {"iteration": position.iteration, "number": position.number, "part": position.part}
        return {**place, "broken": self._broken}

    def _take(self, judge: Judge, rank: int, message: Message | None, now: float) -> None:
        if message is None:
            judge.closed(rank)
        elif "verdict" in message:
            self._end(judge, Verdict(**message["verdict"]))
        else:
            judge.heard(rank, _place(message), now)
            if "ended" in message:
                code, reason = message["ended"]
                judge.ended(rank, code, reason, now)
            # Another rank's collective fails where this one's may wait for ever.
            self._broken |= message["broken"]

    def _end(self, judge: Judge, verdict: Verdict, wire: Wire | None = None) -> None:
        if judge.speaks(verdict):
            # Not through sys.stderr: the main thread may hang with its lock.
            os.write(2, f"mlomae: error: {verdict.line}\n".encode())
        if wire is not None:
            wire.finish(_LINGER)
        if self.before_end is not None:
            self.before_end()
        # The main thread may never return from a collective, and destroying a broken group may hang.
        os._exit(verdict.code)


def _place(message: Message) -> Place:
    return Place(message["iteration"], message["number"], message["part"])


def _join(thread: threading.Thread, seconds: float) -> None:
    """Waits for the thread's end, also through signals to stop: launchers send them when a rank has died."""
    deadline = time.monotonic() + seconds
    while thread.is_alive() and (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(Preempted):
            thread.join(left)


def _is_broken_collective(error: BaseException | None) -> bool:
    """Whether this error, or what it interrupted, may come of another rank's end."""
    while error is not None:
        # gloo raises bare RuntimeErrors.
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error)):
            return True
        error = error.__context__
    return False


def _ending(error: Any) -> tuple[int, str]:
    """Exit code and reason for the other ranks."""
    match error:
        case None:
            return EXIT_OK, "it has finished"
        case UserError():
            return EXIT_USER_ERROR, str(error)
        case Interrupted() | KeyboardInterrupt():
            return EXIT_INTERRUPTED, "it was interrupted"
        case Preempted():
            return EXIT_PREEMPTED, "it was asked to"
        case LostRank():
            return EXIT_LOST, str(error)
    return EXIT_PROBLEMS, " ".join(f"{type(error).__name__}: {error}".split())
