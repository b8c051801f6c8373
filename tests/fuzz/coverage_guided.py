"""The same targets, with inputs that atheris grows by the branches that they reach.

    pip install atheris
    python -m tests.fuzz.coverage_guided image -runs=100000

Words after the target are libFuzzer's. What it finds is written to ``crash-…`` in the present folder.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mlomae"]):
    from tests.fuzz.targets import TARGETS
    from tests.fuzz.watch import watched


def main() -> None:
    """Fuzzes one target until libFuzzer has enough."""
    name, *options = sys.argv[1:]
    target, root = TARGETS[name], Path(tempfile.mkdtemp())
    made, corpus, folder = root / "made", root / "corpus", root / "run"
    made.mkdir()
    corpus.mkdir()
    for number, base in enumerate(target.bases(made)):
        (corpus / str(number)).write_bytes(base)

    def read(content: bytes) -> None:
        folder.mkdir()
        try:
            # libFuzzer has an alarm of its own.
            with watched(folder, patience=0):
                target.read(content, folder)
        finally:
            shutil.rmtree(folder)

    atheris.Setup([sys.argv[0], "-timeout=20", *options, str(corpus)], read)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
