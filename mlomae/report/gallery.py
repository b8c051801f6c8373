"""The pictures of all runs, arranged by section of the page; whoever lacks one is named with the reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlomae.report import maps
from mlomae.report.pictures import FILM, LATEST, Film, Grid, Latest, read_film, read_latest
from mlomae.report.reading import LAST_LINES, Run

_WHY = "(no picture was taken yet, or an older version trained the run)"


@dataclass(frozen=True)
class Exhibit:
    """What is shown of one run.

    Attributes:
        ratio: width over height of its images.
        note: a remark.
    """

    run: int
    content: Any
    ratio: str
    note: str = ""


@dataclass
class Section:
    """Exhibits that share their colour bars.

    Attributes:
        scales: the bars.
        missing: by reason the names of runs that show nothing.
    """

    exhibits: list[Exhibit] = field(default_factory=list)
    scales: list[maps.Scale] = field(default_factory=list)
    missing: dict[str, list[str]] = field(default_factory=dict)

    def lacks(self, run: Run, reason: str) -> None:
        """Takes down why a run shows nothing."""
        self.missing.setdefault(reason, []).append(run.name)


@dataclass(frozen=True)
class Gallery:
    """All sections with pictures."""

    film: Section
    positions: Section
    classes: Section
    influence: Section
    reconstructions: Section


def gallery(runs: Sequence[Run]) -> Gallery:
    """Reads and arranges the pictures of all runs.

    Raises:
        UserError: pictures are damaged.
    """
    films = [read_film(run.path) for run in runs]
    latest = [read_latest(run.path) for run in runs]
    return Gallery(
        film=_film(runs, films, latest),
        positions=_positions(runs, latest),
        classes=_of_latest(runs, latest, _classes),
        influence=_of_latest(runs, latest, _influence),
        reconstructions=_of_latest(runs, latest, _reconstructions),
    )


def _film(runs: Sequence[Run], films: Sequence[Film | None], latest: Sequence[Latest | None]) -> Section:
    section = Section()
    known = [film for run, film in zip(runs, films, strict=True) if film is not None and run.masking.scored]
    limits = maps.probability_bounds(known) if known else (0.0, 1.0)
    section.scales.append(maps.share_scale(*limits))
    for number, (run, film, picture) in enumerate(zip(runs, films, latest, strict=True)):
        if not run.masking.scored:
            section.lacks(run, f"a {run.policy} mask does not learn, and stays as it is")
        elif film is None:
            section.lacks(run, f"no {FILM} {_WHY}")
        else:
            strip = maps.strip(film, picture, limits)
            section.exhibits.append(Exhibit(number, strip, _ratio(film.grid)))
    return section


def _positions(runs: Sequence[Run], latest: Sequence[Latest | None]) -> Section:
    section = Section()
    found: list[tuple[int, maps.Shares, Grid, str]] = []
    for number, (run, picture) in enumerate(zip(runs, latest, strict=True)):
        if picture is not None:
            how = "without noise" if run.masking.selects_by_score else "one draw for each image"
            note = f"Held-out sample at iteration {picture.step:,}, {how}."
            found.append((number, picture.frequency, picture.grid, note))
        elif run.frequency is not None:
            note = f"Training batches with their noise, mean of the last {LAST_LINES} log lines at most."
            found.append((number, run.frequency, run.grid, note))
        else:
            section.lacks(run, "nothing was logged yet")
    if found:
        limits = maps.bounds([frequency for _, frequency, _, _ in found])
        section.scales.append(maps.share_scale(*limits))
        for number, frequency, grid, note in found:
            cell = maps.frequency_cell(frequency, grid, limits)
            section.exhibits.append(Exhibit(number, cell, _ratio(grid), note))
    return section


Finding = tuple[Any, list[maps.Scale], str]


def _of_latest(
    runs: Sequence[Run], latest: Sequence[Latest | None], find: Callable[[Run, Latest], Finding | str]
) -> Section:
    """A section of what the latest pictures hold.

    Args:
        find: content, colour bars of this run and remark; or why there is none.
    """
    section = Section()
    for number, (run, picture) in enumerate(zip(runs, latest, strict=True)):
        if picture is None:
            section.lacks(run, f"no {LATEST} {_WHY}")
            continue
        found = find(run, picture)
        if isinstance(found, str):
            section.lacks(run, found)
        else:
            content, scales, note = found
            section.exhibits.append(Exhibit(number, (content, scales), _ratio(picture.grid), note))
    return section


def _classes(run: Run, latest: Latest) -> Finding | str:
    if latest.classes is None:
        return "its images have no class labels"
    found = maps.class_maps(latest.classes, latest.grid)
    if found is None:
        return f"no two classes, or none with {maps.MIN_CLASS_IMAGES} images in the held-out sample"
    content, *scales = found
    enough = int((latest.classes.count >= maps.MIN_CLASS_IMAGES).sum())
    total = int((latest.classes.count > 0).sum())
    return (
        content,
        scales,
        f"{len(content)} of {enough} classes with enough images; {total} are in the sample.",
    )


def _influence(run: Run, latest: Latest) -> Finding | str:
    found = maps.influence_overlays(latest)
    if found is None:
        return "no hypergradient yet" if run.learns else f"a {run.policy} mask has no hypergradient"
    overlays, scale = found
    step = None if latest.influence is None else latest.influence.step
    return overlays, [scale], "" if step is None else f"Hypergradient of iteration {step:,}."


def _reconstructions(run: Run, latest: Latest) -> Finding | str:
    note = f"Iteration {latest.step:,}."
    if run.config["model.norm_pix"]:
        note += " Mean and contrast of each patch are the true ones (norm_pix)."
    return maps.reconstructions(latest), [], note


def _ratio(grid: Grid) -> str:
    return f"{grid[1]} / {grid[0]}"
