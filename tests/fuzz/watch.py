"""Nothing that an input makes a reader do may hang, run something, or write outside of a folder."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PATIENCE = 20  # seconds for one input
# What only code that an input brings along would do.
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
    "pickle.find_class",
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Of these both ends are paths.
_MOVING = ("os.rename", "os.link", "os.symlink")
_watched: list[Path] = []
_seen: list[str] = []


def _refuse(what: str) -> None:
    """Remembered too: readers take any error of a decoder for a damaged input."""
    _seen.append(what)
    raise AssertionError(what)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched:
        return
    if event in FORBIDDEN:
        _refuse(f"{event} {arguments}")
    if event in ("os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
        _require_inside(event, arguments[0])
    if event in _MOVING:
        _require_inside(event, arguments[0])
        _require_inside(event, arguments[1])
    if event == "open" and (arguments[2] or 0) & _WRITING:
        _require_inside(event, arguments[0])


def _require_inside(event: str, path: object) -> None:
    if isinstance(path, int) or str(path) == os.devnull:
        return
    where = Path(os.fsdecode(path)).resolve()  # type: ignore[arg-type]
    if _watched[0] not in (where, *where.parents):
        _refuse(f"{event} {path}, outside of the run directory")


sys.addaudithook(_audit)


@contextmanager
def watched(folder: Path, patience: int = PATIENCE) -> Iterator[None]:
    """Within the context nothing may hang, be run, or be written elsewhere.

    Args:
        patience: seconds; 0 leaves the alarm alone.

    Raises:
        AssertionError: it was; at once, and on leaving where somebody caught that.
    """

    def too_long(*_: object) -> None:
        _refuse(f"no end after {patience} s")

    if patience:
        before = signal.signal(signal.SIGALRM, too_long)
        signal.alarm(patience)
    _watched.append(folder)
    _seen.clear()
    try:
        yield
        assert not _seen, _seen
    finally:
        _watched.clear()
        if patience:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
