"""The notebook runs from its first cell to its last, in a kernel of its own."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.architecture.source_tree import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOK = ROOT / "examples" / "digits.ipynb"
FIGURES = 4
# Bytes: a notebook is read in a browser, and compared in reviews.
LARGEST = 400_000

pytestmark = pytest.mark.slow


def figures(notebook: Any) -> list[Image.Image]:
    pictures = [
        output.data["image/png"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    return [Image.open(io.BytesIO(base64.b64decode(picture))) for picture in pictures]


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The notebook with the outputs of this version."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    environment = {"PYTHONPATH": str(ROOT), "JUPYTER_RUNTIME_DIR": str(folder), "IPYTHONDIR": str(folder)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        client = nbclient.NotebookClient(
            notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
        )
        client.execute()
    return notebook


def test_every_cell_runs(executed: Any) -> None:
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    assert "learned mask: " in printed and "features: [1797, 128]" in printed


def test_it_draws(executed: Any) -> None:
    drawn = figures(executed)
    assert len(drawn) == FIGURES
    for figure in drawn:
        assert min(figure.size) > 150
        assert len(figure.convert("RGB").getcolors(1 << 24) or []) > 20, "an empty figure"


def test_the_outputs_that_it_comes_with() -> None:
    """Real ones, small, and not of a machine."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert len(figures(notebook)) == FIGURES
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    text = NOTEBOOK.read_text()
    assert len(text.encode()) < LARGEST
    assert str(Path.home()) not in text and os.sep + "tmp" + os.sep not in text
