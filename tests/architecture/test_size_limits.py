"""Files and functions stay short enough to be read in one go."""

from __future__ import annotations

import ast

from tests.architecture.source_tree import ROOT, parse, python_files

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80


def test_files_are_short() -> None:
    lines = {path: len((ROOT / path).read_text().splitlines()) for path in python_files()}
    assert {str(path): count for path, count in lines.items() if count > MAX_FILE_LINES} == {}


def test_functions_are_short() -> None:
    too_long = {}
    for path in python_files():
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                count = node.end_lineno - node.lineno + 1
                if count > MAX_FUNCTION_LINES:
                    too_long[f"{path}:{node.name}"] = count
    assert too_long == {}
