"""What mkdocs does beside its own: documents outside of this folder, and tables of the configuration.

A page may link to any file of the repository by its relative path, as a code host wants it. Documents and
records that are named here become part of the site, below ``project/``, and the links to them are rewritten.
A link to any other file outside of this folder is left to mkdocs, which refuses it.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from mlomae.config import Config
from mlomae.config_arguments import Flag, flags

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "project"
PUBLISHED = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "LICENSE",
    "SECURITY.md",
    "benchmarks/README.md",
    "benchmarks/peers/README.md",
    "benchmarks/ratios.json",
    "benchmarks/results/*.json",
    "ds_configs/README.md",
    "examples/*.ipynb",
    "recipes/**/*.yaml",
    "tests/ops/resources.json",
)
# A fenced block, in which nothing is a link, or the target of a link of Markdown or HTML.
_TARGET = re.compile(
    r'^```.*?^```|(?<=\]\()[^)\s]+|(?<= src=")[^"]+|(?<= href=")[^"]+', re.MULTILINE | re.DOTALL
)
_FIELDS = "<!-- fields -->"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what is published from outside of the folder."""
    for pattern in PUBLISHED:
        for path in sorted(ROOT.glob(pattern)):
            uri = f"{FOLDER}/{path.relative_to(ROOT).as_posix()}"
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points links to where their targets are in the site, and fills in the tables."""
    uri = page.file.src_uri
    if uri.startswith(f"{FOLDER}/"):  # found, but after the pages for users
        page.meta["search"] = {"boost": 0.3, "exclude": uri == f"{FOLDER}/README.md"}
    markdown = _TARGET.sub(lambda match: _moved(match[0], uri), markdown)
    return markdown.replace(_FIELDS, "\n".join(_field_tables())) if _FIELDS in markdown else markdown


def _moved(target: str, uri: str) -> str:
    if target.startswith(("```", "#", "/")) or ":" in target:
        return target
    path, hash_sign, anchor = target.partition("#")
    source = uri.removeprefix(f"{FOLDER}/") if uri.startswith(f"{FOLDER}/") else f"docs/{uri}"
    found = normpath(join(dirname(source), path))
    there = found.removeprefix("docs/") if found.startswith("docs/") else f"{FOLDER}/{found}"
    return relpath(there, dirname(uri)) + hash_sign + anchor


def _field_tables() -> list[str]:
    """Every field of a run, a table for each section."""
    lines: list[str] = []
    section = None
    for flag in flags(Config):
        parent, _, name = flag.name.rpartition(".")
        if parent != section:
            section = parent
            title = f"`{section}`" if section else "The run"
            lines += ["", f"## {title}", "", "| field | default | |", "|---|---|---|"]
        lines.append(f"| `{name}` | {_code(flag.default)} | {_meaning(flag)} |")
    return lines


def _code(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`[{', '.join(map(str, value))}]`" if isinstance(value, tuple) else f"`{value}`"


def _meaning(flag: Flag) -> str:
    choices = [choice for choice in flag.choices if flag.kind is not bool]
    words = [", ".join(f"`{choice}`" for choice in choices)] if choices else []
    if flag.description:
        words.append(html.escape(flag.description, quote=False).replace("|", "/"))
    return ". ".join(words)
