"""Signals that ask a run to stop: those of schedulers, before they take a machine back, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mlomae.errors import Interrupted, Preempted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_NOTICE = b"mlomae: interrupted: saves after this step and stops; once more stops at once\n"


class Preemption:
    """While entered, SIGTERM and SIGUSR1 raise ``Preempted``, SIGINT raises KeyboardInterrupt.

    At once while a run is built and while it is evaluated. While it trains (``deferred``) a signal is only
    remembered, and the caller asks after every step: raised in the middle of one, the exception could leave a
    lock of some library held, and the run would hang at its end. A second SIGINT does not wait. Does nothing
    outside the main thread, which alone may handle signals.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._deferred = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # Shells start background jobs with SIGINT ignored: it is meant for others.
                if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._received is not None

    def stopped(self, saved: str | None) -> Preempted:
        """What a run raises once it has saved its state.

        Args:
            saved: what is done: ``iteration 7``; None where nothing could be saved yet.
        """
        cause = "a signal to another rank" if self._received is None else self._received.name
        kind = Interrupted if self._received is signal.SIGINT else Preempted
        if saved is None:
            return kind(f"stopped by {cause} before anything was saved; the same command begins anew")
        return kind(f"stopped by {cause} after {saved}, which is saved; the same command goes on")

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the context a signal is remembered only.

        Raises:
            Preempted: on leaving, if a signal came after the last question.
            KeyboardInterrupt: so, if it was SIGINT.
        """
        self._deferred = True
        yield
        # Not after an exception: the run is leaving, and another signal would only disturb it.
        self._deferred = False
        if self._received is not None:
            raise self._stop(self._received)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = self._received is signal.SIGINT and number == signal.SIGINT
        self._received = signal.Signals(number)
        if again or not self._deferred:
            raise self._stop(self._received)
        if number == signal.SIGINT:
            os.write(2, _NOTICE)  # print may be what was interrupted

    @staticmethod
    def _stop(number: signal.Signals) -> BaseException:
        if number is signal.SIGINT:
            return KeyboardInterrupt()
        return Preempted(f"stopped by {number.name}; the same command goes on from the last checkpoint")
