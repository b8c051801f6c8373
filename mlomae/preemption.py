"""Signals that ask a run to stop, as schedulers send them before they take a machine back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mlomae.errors import Preempted

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """While entered, SIGTERM and SIGUSR1 raise ``Preempted``: at once, or where nothing is lost by it.

    At once while a run is built and while it is evaluated. While it trains (``deferred``) a signal is only
    remembered, and the caller asks after every outer iteration. Does nothing outside the main thread, which
    alone may handle signals.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._deferred = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._received is not None

    @property
    def reason(self) -> str:
        """The signal in words; another rank's where this process received none."""
        return "a signal to another rank" if self._received is None else self._received.name

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the context a signal is remembered only.

        Raises:
            Preempted: on leaving, if a signal came after the last question.
        """
        self._deferred = True
        yield
        # Not after an exception: the run is leaving, and another signal would only disturb it.
        self._deferred = False
        if self._received is not None:
            raise self._stop()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number)
        if not self._deferred:
            raise self._stop()

    def _stop(self) -> Preempted:
        return Preempted(f"stopped by {self.reason}; the same command goes on from the last checkpoint")
