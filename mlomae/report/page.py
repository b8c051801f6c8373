"""From runs to one HTML file: data, template, style and script in one place."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mlomae import __version__
from mlomae.report.curves import curves
from mlomae.report.evaluations import evaluation_tables, result_table, seed_table
from mlomae.report.gallery import gallery
from mlomae.report.machine import machine_table, settings
from mlomae.report.reading import Run
from mlomae.report.summary import card

# Colours and line styles of runs, as style.css has them; later runs take the same colours dashed.
NUM_COLORS = 8
_SCRIPTS = ("format.js", "plot.js", "curves.js", "film.js", "main.js")


def render(runs: Sequence[Run]) -> bytes:
    """The page as UTF-8.

    Everything that comes from a run is escaped by the template. Should that ever fail, the page's policy lets
    a browser run no script but the two whose hashes it names, and load nothing.

    Raises:
        UserError: pictures of a run are damaged.
    """
    environment = Environment(
        loader=PackageLoader("mlomae.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    theme, script = _asset("theme.js"), "\n".join(map(_asset, _SCRIPTS))
    groups = curves(runs)
    page = environment.get_template("page.html").render(
        version=__version__,
        made=datetime.now(UTC).strftime("%d %B %Y, %H:%M UTC").lstrip("0"),
        title=_title(runs),
        names=[run.name for run in runs],
        colors=NUM_COLORS,
        cards=[card(run) for run in runs],
        groups=groups,
        gallery=gallery(runs),
        result=result_table(runs),
        seeds=seed_table(runs),
        evaluations=evaluation_tables(runs),
        unevaluated=[run.name for run in runs if not run.evaluations],
        unfinished=[run.name for run in runs if run.result is None],
        settings=settings(runs),
        machine=machine_table(runs),
        undescribed=[run.name for run in runs if run.environment is None],
        data={
            "runs": [{"name": run.name, "end": run.step} for run in runs],
            "panels": [panel.data for group in groups for panel in group.panels],
        },
        style=Markup(_asset("style.css")),
        theme=Markup(theme),
        script=Markup(script),
        hashes=[_hash(theme), _hash(script)],
    )
    # Names of files need not be text, and JSON may smuggle in halves of characters.
    return page.encode(errors="replace")


def _title(runs: Sequence[Run]) -> str:
    names = [run.name for run in runs]
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} other runs"


def _asset(name: str) -> str:
    return (files("mlomae.report") / "assets" / name).read_text()


def _hash(script: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
