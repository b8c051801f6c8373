"""Tables and plots of docs/evidence.md, from the recorded results of the studies.

    python -m benchmarks.evidence

A table stands between two comments, ``<!-- table STUDY BUDGET -->`` and ``<!-- end -->``; the plots of a
study lie in docs/images/evidence/STUDY. Their gallery needs the pictures of the runs: it is the one that
``mlomae study`` has written.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast, get_args

from benchmarks.environment import RESULTS, ROOT
from benchmarks.plots import IMAGES
from mlomae.run_dir import write_atomically
from mlomae.study.plan import Budget
from mlomae.study.plots import draw
from mlomae.study.report import table
from mlomae.study.results import load_results

PAGE = ROOT / "docs" / "evidence.md"
STUDIES = RESULTS / "studies"
PLOTS = IMAGES / "evidence"
_TABLE = re.compile(rf"(<!-- table (\w+) ({'|'.join(get_args(Budget))}) -->\n).*?(?=<!-- end -->)", re.DOTALL)


def recorded() -> list[Path]:
    """The results files of all studies, by name."""
    return sorted(STUDIES.glob("*.json"))


def with_tables(page: str) -> str:
    """A page with every table as the results have it."""

    def fill(found: re.Match[str]) -> str:
        results = load_results(STUDIES / f"{found[2]}.json")
        return f"{found[1]}\n{table(results, cast('Budget', found[3]))}\n\n"

    return _TABLE.sub(fill, page)


def main() -> None:
    """Writes tables and plots."""
    write_atomically(PAGE, with_tables(PAGE.read_text()).encode())
    for path in recorded():
        folder = PLOTS / path.stem
        folder.mkdir(parents=True, exist_ok=True)
        draw(load_results(path), (), folder)


if __name__ == "__main__":
    main()
