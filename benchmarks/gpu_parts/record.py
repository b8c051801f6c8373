"""The record of a run: one file that is whole after every part, and what is shown of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts.catalogue import Part
from benchmarks.gpu_parts.files import markdown, write_json

WELL = ("done", "skipped")
_WIDTH = 90


class Record:
    """Collects the results of the parts.

    Args:
        path: of the file; None writes none.
        head: where and with what was measured.
    """

    def __init__(self, path: Path | None, head: Mapping[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {**head, "parts": {}, "bars": []}
        self.write()

    def add(self, part: Part, result: Mapping[str, Any]) -> None:
        """Records and shows what a part found."""
        self.content["parts"][part.name] = {"about": part.about, **result}
        self.content["bars"] += result["bars"]
        self.write()
        print(f"\n## {part.name}: {part.about}: {result['status']}", flush=True)
        for table in result["tables"].values():
            if table["shown"] and not self.content["smoke"]:
                print(f"\n{table['title']}\n\n{markdown(table['rows'])}", flush=True)
        for note in result["notes"]:
            print(f"- {note}", flush=True)
        for failure in result["failures"]:
            print(f"- FAILED {failure['what']}: {failure['error']}", flush=True)
        if result["reason"]:
            print(f"- {result['reason']}", flush=True)
        for line in result.get("log", ()):
            print(f"    {line}", flush=True)

    def note(self, name: str, value: Any) -> None:
        """Records something about the whole run."""
        self.content[name] = value
        self.write()

    def write(self) -> None:
        if self.path is not None:
            write_json(self.path, self.content)

    @property
    def good(self) -> bool:
        """Whether every part came to its end and every bar is met."""
        parts_well = all(part["status"] in WELL for part in self.content["parts"].values())
        return parts_well and all(bar["met"] is not False for bar in self.content["bars"])

    def summary(self) -> str:
        """The parts and the bars."""
        parts = [
            {
                "part": name,
                "status": part["status"],
                "prepare, s": _seconds(part, "prepare"),
                "measure, s": _seconds(part, "measure"),
                "why": _why(part),
            }
            for name, part in self.content["parts"].items()
        ]
        bars = [
            {
                "bar": bar["what"],
                "found": "not measured" if bar["value"] is None else bar["value"],
                "": bar["relation"],
                "bound": bar["bound"],
                "met": bar["met"],
            }
            for bar in self.content["bars"]
            if bar["met"] is not None
        ]
        return f"{markdown(parts)}\n\n{markdown(bars)}"


def _seconds(part: Mapping[str, Any], half: str) -> str:
    found = part["seconds"].get(half)
    return "" if found is None else f"{found:.0f}"


def _why(part: Mapping[str, Any]) -> str:
    text: str = part["reason"] or "; ".join(failure["what"] for failure in part["failures"])
    return text if len(text) < _WIDTH else f"{text[:_WIDTH]}…"
