from __future__ import annotations

import re
from pathlib import Path

import pytest

from mlomae.bad_samples import BadSamples
from mlomae.data.faults import Fault
from mlomae.data.ledger import FaultLedger
from mlomae.errors import UserError

CUT, TEXT, CUT_TOO = (
    Fault("a/1", "damaged", "ends early"),
    Fault("a/2", "not-an-image", "is text"),
    Fault("b/é", "damaged", "ends early"),
)


def ledger(share: float = 0.5, samples: int = 10) -> FaultLedger:
    made = FaultLedger(share)
    made.expect(samples)
    return made


def test_a_sample_counts_once() -> None:
    some = ledger()
    some.add([CUT, TEXT])
    some.add([CUT, CUT_TOO])
    assert len(some) == 3 and some.counts == {"damaged": 2, "not-an-image": 1}
    assert some.take_new() == [CUT, TEXT, CUT_TOO] and some.take_new() == []


def test_too_many_stop_with_a_reason() -> None:
    some = ledger(share=0.2)
    some.add([CUT, TEXT])
    message = (
        "data.max_bad_share: 3 of 10 samples are bad (2 damaged, 1 not-an-image), more than the 0.2 allowed; "
        "the last one is b/é (ends early); repair or remove them (and bad_samples.jsonl), or raise the share"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        some.add([CUT_TOO])
    with pytest.raises(UserError, match="1 of 10 samples are bad"):
        ledger(share=0.0).add([CUT])


def test_a_file_names_them_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "bad_samples.jsonl"
    first = ledger()
    log = BadSamples(first, path)
    log.restore()
    log.exchange()
    assert not path.exists()  # nothing to tell
    first.add([CUT, TEXT])
    log.exchange()
    log.exchange()
    before = path.read_text()
    assert before.count("\n") == 2
    path.write_text(before + '{"key": "b/')  # killed while it wrote
    second = ledger()
    second.add([TEXT])  # met before the file was read
    log = BadSamples(second, path)
    log.restore()
    second.add([CUT, CUT_TOO])
    log.write_own()
    assert path.read_text().startswith(before) and path.read_text().count("\n") == 3
    assert len(second) == 3


def test_the_limit_holds_over_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "bad_samples.jsonl"
    first = ledger()
    first.add([CUT, TEXT])
    BadSamples(first, path).exchange()
    second = ledger(share=0.2)
    BadSamples(second, path).restore()
    with pytest.raises(UserError, match="3 of 10 samples are bad"):
        second.add([CUT_TOO])
