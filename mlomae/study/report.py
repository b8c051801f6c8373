"""A study as a page of Markdown: a table for each budget, and what its pictures show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

from mlomae.report.figures import name_of
from mlomae.study.comparison import CONFIDENCE, Compared, compare
from mlomae.study.plan import Budget
from mlomae.study.results import Results

TITLES = {"steps": "At equal steps", "flops": "At equal FLOPs"}
DIFFERENCES, HEALTH, GALLERY = "differences.svg", "masks.svg", "gallery.png"


def render(results: Results, pictures: Sequence[str]) -> str:
    """The page.

    Args:
        pictures: names of files beside it.
    """
    done, planned = len(results.rows), results.planned
    machine = ", ".join(f"{name} {value}" for name, value in results.machine.items() if value is not None)
    head = [
        "# Study",
        f"{done} of {planned} runs; {machine}.",
        "Means ± standard deviations over seeds, in percent. Δ: difference to the baseline in percentage "
        f"points, of runs with the same seed, ± half of the {CONFIDENCE:.0%} confidence interval "
        "(Student's t); bold where that excludes 0. Nothing is corrected for the number of comparisons.",
    ]
    tables = [f"## {TITLES[budget]}\n\n{table(results, budget)}" for budget in results.budgets]
    shown = [f"![]({name})" for name in pictures]
    return "\n\n".join([*head, *tables, *shown]) + "\n"


def table(results: Results, budget: Budget) -> str:
    """Markdown: an arm per row."""
    arms = compare(results, budget)
    figures = list(dict.fromkeys(figure for arm in arms for row in arm.rows for figure in row.figures))
    titles = ["arm", "runs", "steps", "TFLOP", "seconds"]
    for figure in figures:
        titles += [name_of(figure).text, "Δ"]
    lines = [titles, ["---"] * len(titles), *(list(_cells(arm, figures)) for arm in arms)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(arm: Compared, figures: Sequence[str]) -> Iterator[str]:
    first = arm.rows[0]
    yield arm.arm
    yield str(len(arm.rows))
    yield f"{first.steps:,}"
    yield f"{first.flops / 1e12:,.3g}"
    yield f"{fmean(row.seconds for row in arm.rows):,.0f}"
    for figure in figures:
        if figure not in first.figures:
            yield from ("", "")
            continue
        sd = arm.sd(figure)
        yield f"{100 * arm.mean(figure):.2f}" + ("" if sd is None else f" ± {100 * sd:.2f}")
        found = arm.differences.get(figure)
        if found is None:
            yield ""
            continue
        text = f"{100 * found.mean:+.2f}" + ("" if found.half is None else f" ± {100 * found.half:.2f}")
        yield f"**{text}**" if found.excludes_zero else text
