"""Which samples of a run turned out to be bad, and when there are too many of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from mlomae.data.faults import Fault, count_kinds
from mlomae.errors import UserError


class FaultLedger:
    """Distinct bad samples, by key.

    Args:
        max_share: of all samples that may be bad.
    """

    def __init__(self, max_share: float) -> None:
        self.max_share = max_share
        self.num_samples = 0
        self._known: dict[str, Fault] = {}
        self._new: list[Fault] = []

    def expect(self, num_samples: int) -> None:
        """Counts the samples of one more set, bad ones included."""
        self.num_samples += num_samples

    def add(self, faults: Iterable[Fault]) -> None:
        """Takes down what was met.

        Raises:
            UserError: too many samples are bad.
        """
        if self.note(faults):
            self.check()

    def note(self, faults: Iterable[Fault]) -> bool:
        """Takes down what was met, whatever its number; whether anything is new."""
        before = len(self._known)
        for fault in faults:
            if fault.key not in self._known:
                self._known[fault.key] = fault
                self._new.append(fault)
        return len(self._known) > before

    def restore(self, faults: Iterable[Fault]) -> None:
        """Takes over what is known already and need not be told again."""
        known = {fault.key: fault for fault in faults}
        self._new = [fault for fault in self._new if fault.key not in known]
        self._known = {**known, **self._known}

    def check(self) -> None:
        """Holds the number against the limit.

        Raises:
            UserError: too many samples are bad.
        """
        found = len(self._known)
        if found > self.max_share * self.num_samples:
            last = next(reversed(self._known.values()))
            kinds = count_kinds(self._known.values())
            raise UserError(
                f"data.max_bad_share: {found} of {self.num_samples} samples are bad ({kinds}), "
                f"more than the {self.max_share:.3g} allowed; the last one is {last.key} ({last.reason}); "
                "repair or remove them (and bad_samples.jsonl), or raise the share"
            )

    def take_new(self) -> list[Fault]:
        """What was added since the last call."""
        new, self._new = self._new, []
        return new

    def __len__(self) -> int:
        return len(self._known)

    @property
    def counts(self) -> dict[str, int]:
        """Bad samples by kind, most frequent first."""
        return dict(Counter(fault.kind for fault in self._known.values()).most_common())
