"""The documentation site: built as a reader builds it, complete, and at home without a network."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.architecture.source_tree import ROOT

for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
    pytest.importorskip(package, reason="the site needs pip install 'mlomae[docs]'")

pytestmark = pytest.mark.slow

# Attributes by which a page loads something; those of <a> only lead to it.
_LOADING = ("src", "srcset", "data", "poster")
# Answers every address, so that its own are absolute.
_NOT_FOUND = "404.html"


class _Links(HTMLParser):
    """The addresses in a page: of what it loads, and of where it leads."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.led_to: list[str] = []
        self.ids: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        self.loaded += [given[name] for name in _LOADING if name in given]
        if "href" in given:
            (self.led_to if tag == "a" else self.loaded).append(given["href"])


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of the site, and what building it said."""
    site = tmp_path_factory.mktemp("site")
    # The theme advertises its successor.
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return site, said


@pytest.fixture(scope="module")
def pages(build: tuple[Path, str]) -> dict[Path, _Links]:
    return {page: _Links(page) for page in sorted(build[0].rglob("*.html")) if page.name != _NOT_FOUND}


def test_it_is_built_without_warnings(build: tuple[Path, str]) -> None:
    assert [line for line in build[1].splitlines() if line.startswith(("WARNING", "ERROR"))] == []


def test_every_document_for_users_has_a_page(build: tuple[Path, str]) -> None:
    documents = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    wanted = [document.with_suffix(".html") for document in documents if document.parts[0] != "dev"]
    assert len(wanted) > 20
    wanted += [
        Path("project") / f"{name}.html" for name in ("index", "CONTRIBUTING", "CHANGELOG", "SECURITY")
    ]
    assert [page for page in wanted if not (build[0] / page).is_file()] == []
    assert not (build[0] / "dev").exists()


def test_every_page_is_in_the_navigation(build: tuple[Path, str], pages: dict[Path, _Links]) -> None:
    start = build[0] / "index.html"
    listed = {(start.parent / urlsplit(link).path).resolve() for link in pages[start].led_to}
    assert [page for page in pages if page.resolve() not in listed] == []


def test_nothing_is_loaded_from_another_host(pages: dict[Path, _Links]) -> None:
    foreign = [
        (page.name, link)
        for page, links in pages.items()
        for link in links.loaded
        if urlsplit(link).netloc or urlsplit(link).scheme not in ("", "data")
    ]
    assert foreign == []


def test_style_sheets_load_nothing_from_another_host(build: tuple[Path, str]) -> None:
    sheets = list(build[0].rglob("*.css"))
    assert sheets
    for sheet in sheets:
        text = sheet.read_text()
        assert not any(f"url({quote}{start}" in text for quote in ("", "'", '"') for start in ("http", "//"))


def test_no_link_is_broken(build: tuple[Path, str], pages: dict[Path, _Links]) -> None:
    """Also those in raw HTML, of which mkdocs knows nothing."""
    assert list(_broken(pages)) == []


def _broken(pages: dict[Path, _Links]) -> Iterator[tuple[str, str]]:
    by_path = {page.resolve(): links for page, links in pages.items()}
    for page, links in pages.items():
        for link in {*links.loaded, *links.led_to}:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page.resolve()
            if target.is_dir():
                target /= "index.html"
            anchors = by_path[target].ids if target in by_path else None
            if not target.is_file() or (
                parts.fragment and anchors and unquote(parts.fragment) not in anchors
            ):
                yield page.name, link
