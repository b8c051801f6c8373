"""The bad samples of a run: gathered from all ranks, named in a file, counted against the limit."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from mlomae.data.faults import Fault
from mlomae.data.ledger import FaultLedger
from mlomae.distributed import collectives


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
        """Reads what was met before this run was resumed."""
        if not self._path.exists():
            return
        # A killed process may have left half a line at the end.
        lines = [line for line in self._path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        self._ledger.restore(Fault(**json.loads(line)) for line in lines)
        if collectives.is_primary():
            self._path.write_text("".join(lines))

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
        """Names what this rank has met; for a run that ends early, without the other ranks."""
        self._append(self._ledger.take_new())

    def _append(self, faults: Iterable[Fault]) -> None:
        text = "".join(json.dumps(asdict(fault), ensure_ascii=False) + "\n" for fault in faults)
        if text:
            with self._path.open("a") as file:
                file.write(text)
