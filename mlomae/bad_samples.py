"""The bad samples of a run: gathered from all ranks, named in a file, counted against the limit."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from mlomae.data.faults import Fault
from mlomae.data.ledger import FaultLedger
from mlomae.distributed import collectives
from mlomae.errors import UserError
from mlomae.run_dir import write_atomically


class BadSamples:
    """``bad_samples.jsonl`` of a run: one line {"key", "kind", "reason"} for each bad sample.

    Args:
        ledger: of this rank; rank 0's learns what the others have met.
        path: of the file; what a resumed run finds in it is known from the start.
    """

    def __init__(self, ledger: FaultLedger, path: Path) -> None:
        self._ledger = ledger
        self._path = path

    def restore(self) -> None:
        """Takes over what was met before this run was resumed; called on all ranks together."""
        known: list[Fault] = []

        def read() -> None:
            # A killed process may have left half a line at the end.
            *lines, rest = self._path.read_bytes().split(b"\n") if self._path.exists() else [b""]
            known.extend(_parse(line) for line in lines)
            if rest:
                write_atomically(self._path, b"".join(line + b"\n" for line in lines))

        collectives.on_primary(read)
        self._ledger.restore(collectives.broadcast_object(known))

    def exchange(self) -> None:
        """Takes down what all ranks have met; called on all of them together.

        Raises:
            UserError: on every rank, if too many samples are bad.
        """
        gathered = collectives.gather_object(self._ledger.take_new())

        def write() -> None:
            assert gathered is not None
            own, *others = gathered
            self._append(own)
            for faults in others:
                self._ledger.note(faults)
            self._append(self._ledger.take_new())
            self._ledger.check()

        collectives.on_primary(write)

    def write_own(self) -> None:
        """Names what rank 0 has met; for a run that ends early, without the other ranks."""
        if collectives.is_primary():
            with suppress(OSError):  # the reason for the end matters more
                self._append(self._ledger.take_new())

    def _append(self, faults: Iterable[Fault]) -> None:
        content = b"".join(_format(fault) + b"\n" for fault in faults)
        if content:
            with self._path.open("ab") as file:
                file.write(content)


def _format(fault: Fault) -> bytes:
    try:
        return json.dumps(asdict(fault), ensure_ascii=False).encode()
    except UnicodeEncodeError:  # names of files need not be text
        return json.dumps(asdict(fault)).encode()


def _parse(line: bytes) -> Fault:
    try:
        return Fault(**json.loads(line))
    except (ValueError, TypeError):
        raise UserError(f"bad_samples.jsonl: found {line[:60]!r}, expected key, kind and reason") from None
