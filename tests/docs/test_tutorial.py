"""The tutorial as a reader follows it: every command and block of Python, as they stand and in order."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest
from PIL import Image

from tests.docs.commands import SHELLS, blocks, commands
from tests.docs.execution import Execution

TUTORIAL = "docs/tutorial.md"


@pytest.mark.slow
def test_the_tutorial_works(execute: Execution) -> None:
    runs = execute.place(TUTORIAL).folder / "runs"
    printed = ""
    for block in blocks(TUTORIAL):
        if block.language in SHELLS:
            for command in commands(TUTORIAL):
                if command.block == block:
                    printed = execute.run(TUTORIAL, command.line, command.text)
        elif block.language == "python":
            printed = execute.script(block)
        elif block.language == "text" and "…" not in block.text and not any(map(str.isdigit, block.text)):
            assert printed == block.text, f"{TUTORIAL}:{block.line} shows something else"

    for run in ("learned", "random"):
        result = json.loads((runs / run / "result.json").read_text())
        assert result["policy"] == run and result["knn_accuracy"] > 0.88
    lines = (runs / "learned" / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(line)["task"] for line in lines] == ["knn", "linear"]
    HTMLParser().feed((runs / "compare.html").read_text())
    with Image.open(runs / "seven.png") as picture:
        assert picture.width > 300
