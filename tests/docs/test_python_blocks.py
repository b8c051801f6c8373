"""Every block of Python in the documents runs as it stands; ``test_tutorial.py`` runs the tutorial's."""

from __future__ import annotations

import pytest

from tests.docs.commands import Block, different, python_blocks
from tests.docs.execution import Execution

TUTORIAL = "docs/tutorial.md"
BENCHMARKS = "benchmarks/README.md"
BLOCKS = different(block for block in python_blocks() if block.page != TUTORIAL)
# What the benchmark that is shown measures.
MEASURED = """\
import torch

from benchmarks.comparison import Compare


def ours():
    return torch.ones(8).sum()


eager = ours
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "block",
    [block for block in BLOCKS if block.page != BENCHMARKS],
    ids=lambda block: f"{block.page}:{block.line}",
)
def test_documented_python_runs(block: Block, execute: Execution) -> None:
    execute.script(block)


@pytest.mark.slow
def test_documented_benchmark_runs(execute: Execution) -> None:
    """It is a test and needs something to compare."""
    (block,) = (block for block in BLOCKS if block.page == BENCHMARKS)
    file = execute.place(BENCHMARKS).folder / "benchmarks" / "test_shown.py"
    file.write_text(f"{MEASURED}\n\n{block.text}")
    options = "-n0 --iterations 2 -p no:cacheprovider -W ignore::pytest.PytestAssertRewriteWarning"

    printed = execute.run(BENCHMARKS, block.line, f"pytest benchmarks/test_shown.py {options}")

    assert "1 passed" in printed
