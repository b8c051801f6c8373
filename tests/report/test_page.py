"""The page: one file, complete, harmless whatever a run is called, and honest about what is missing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from mlomae.errors import UserError
from mlomae.report.command import main
from mlomae.report.page import NUM_COLORS
from tests.report.made import Made, make_run

MAX_BYTES = 5_000_000
SECTIONS = [
    "summary", "curves", "evolution", "positions", "influence", "reconstructions", "evaluations",
    "configuration", "machine",
]  # fmt: skip
HOSTILE = "<img src=x onerror=alert(1)>{{ 7 * 7 }}\"'&"


class Reader(HTMLParser):
    """Elements, text and scripts of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._open and tag == self._open[-1]:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if not self._open:
            self.texts.append(data)
        elif self._open[-1] == "script":
            self.scripts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def with_attribute(self, name: str) -> Iterator[str]:
        return (value or "" for _, found in self.elements for key, value in found.items() if key == name)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    made = Made(gain=0.02), Made(policy="random", pictured=2)
    return [make_run(root / name, kind) for name, kind in zip(("learned", "random"), made, strict=True)]


def report(out: Path, *runs: Path) -> str:
    assert main([*map(str, runs), "--out", str(out)]) == 0
    return out.read_text()


@pytest.fixture(scope="module")
def page(pair: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(report(tmp_path_factory.mktemp("out") / "page.html", *pair))


def test_page_is_whole_and_has_all_sections(page: Reader) -> None:
    assert [found["id"] for tag, found in page.elements if tag == "section"] == SECTIONS
    assert set(page.with_attribute("href")) >= {f"#{name}" for name in SECTIONS}
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_page_needs_nothing_else(page: Reader) -> None:
    for name in ("src", "href", "action", "srcset", "data"):
        assert all(value.startswith(("data:", "#")) for value in page.with_attribute(name)), name
    urls = re.findall(r"url\(([^)]*)\)", " ".join(page.with_attribute("style")))
    assert urls and all(url.startswith("data:") for url in urls)
    style = (files("mlomae.report") / "assets" / "style.css").read_text()
    assert "url(" not in style and "@import" not in style


def test_policy_names_the_scripts_and_nothing_else(page: Reader) -> None:
    (policy,) = (found["content"] for tag, found in page.elements if "http-equiv" in found)
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")
    assert policy.count("sha256-") == 2 and "script-src 'sha256-" in policy
    kinds = [found.get("type") for tag, found in page.elements if tag == "script"]
    assert kinds == [None, "application/json", "module"]
    assert not any(name.startswith("on") for _, found in page.elements for name in found)


def test_pictures_have_words(page: Reader) -> None:
    photos = [found for tag, found in page.elements if tag == "img"]
    assert len(photos) > 100 and all("alt" in found for found in photos)
    words = " ".join(found["alt"] or "" for found in photos)
    for expected in ("held-out image 1", "its reconstruction", "its influence", "most often removed"):
        assert expected in words


def test_ids_are_unique(page: Reader) -> None:
    ids = list(page.with_attribute("id"))
    assert len(ids) == len(set(ids))
    assert set(page.with_attribute("aria-labelledby")) <= set(ids)


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    # A slash cannot be in the name of a folder, but it is between two.
    paths = [tmp_path / parent / f"script>{HOSTILE}" for parent in ("<", "b")]
    for path in paths:
        make_run(path, Made(logged=3, pictured=1))
        config = yaml.safe_load((path / "config.yaml").read_text())
        config["data"]["path"] = f"</script>{HOSTILE}{path.parent.name}"
        (path / "config.yaml").write_text(yaml.safe_dump(config))
        evaluation = {"task": "</td><script>x</script>", "accuracy": 0.5, "out": "a/</script><b onclick=x>"}
        (path / "evaluations.jsonl").write_text(json.dumps(evaluation) + "\n")
        (path / "environment.json").write_text('{"device": "<svg/onload=alert(1)>"}')
    reader = Reader(report(tmp_path / "page.html", *paths))
    assert f"</script>{HOSTILE}" in reader.text
    assert len([tag for tag, _ in reader.elements if tag == "script"]) == 3
    assert not any(name.startswith("on") for _, found in reader.elements for name in found)
    assert not any(tag == "svg" for tag, _ in reader.elements)
    assert f"</script>{HOSTILE}" not in "".join(reader.scripts)
    assert all(value != "x" for value in reader.with_attribute("src"))


def test_names_that_are_no_text(tmp_path: Path) -> None:
    path = make_run(tmp_path / "ab", Made(logged=2, pictured=0))
    (path / "evaluations.jsonl").write_text('{"task": "knn", "accuracy": 0.5, "out": "a/\\udcff"}\n')
    odd = path.rename(tmp_path / "a\udcffb")
    assert "a\N{REPLACEMENT CHARACTER}b" in report(tmp_path / "page.html", odd)


def test_missing_data_is_said(tmp_path: Path) -> None:
    path = make_run(tmp_path / "new", Made(logged=1, pictured=0, finished=False))
    for name in ("metrics.jsonl", "environment.json"):
        (path / name).unlink()
    text = Reader(report(tmp_path / "page.html", path)).text
    for expected in (
        "Nothing was logged yet",
        "No film of new: no pictures.jsonl",
        "No map of new: nothing was logged yet",
        "No maps by class of new: no pictures.safetensors",
        "No influence of new: no pictures.safetensors",
        "No reconstructions of new: no pictures.safetensors",
        "No result.json of new",
        "No evaluations.jsonl of new",
        "No environment.json of new",
    ):
        assert expected in text


def test_what_a_policy_does_not_have_is_said(page: Reader) -> None:
    assert "No film of random: a random mask does not learn" in page.text
    assert "No influence of random: a random mask has no hypergradient" in page.text
    assert "not logged by random" in page.text
    assert "No two runs differ in the seed alone" in page.text


def test_long_run_makes_a_small_page(tmp_path: Path) -> None:
    made = Made(side=224, patch=16, logged=2500, every=4, pictured=100)
    path = make_run(tmp_path / "long", made)
    report(tmp_path / "page.html", path)
    assert (tmp_path / "page.html").stat().st_size < MAX_BYTES


def test_default_place_is_the_first_run(pair: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(path) for path in pair]) == 0
    out = pair[0] / "report.html"
    assert out.read_text().startswith("<!doctype html>")
    assert capsys.readouterr().out.startswith(f"report: {out} (")
    assert not (pair[1] / "report.html").exists()
    out.unlink()


def test_old_page_stays_where_the_new_one_fails(pair: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    out.write_text("old")
    bad = make_run(tmp_path / "bad", Made(logged=2, pictured=1))
    (bad / "pictures.jsonl").write_text("?\n")
    with pytest.raises(UserError, match=r"pictures\.jsonl: line 1 is damaged"):
        main([str(pair[0]), str(bad), "--out", str(out)])
    assert out.read_text() == "old"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: RUN"),
        (["none"], "run none: no such folder"),
        (["{run}", "--out", "{folder}"], "is a folder; give a file"),
        (["{run}", "--out", "{folder}/none/page.html"], "cannot be written (No such file or directory)"),
        (["{run}", "--colour"], "--colour"),
    ],
)
def test_misuse_is_one_line(pair: list[Path], tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        main([word.format(run=pair[0], folder=tmp_path) for word in words])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def luminance(color: str) -> float:
    parts = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_has_contrast_in_both_themes() -> None:
    style = (files("mlomae.report") / "assets" / "style.css").read_text()
    found = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", style)
    colors = {name: (light, dark) for name, light, dark in found}
    runs = [f"run-{number}" for number in range(NUM_COLORS)]
    assert f"run-{NUM_COLORS}" not in colors
    for theme in (0, 1):
        for text in ("text", "muted", "accent", *runs):
            for ground in ("back", "surface"):
                dark, bright = sorted(luminance(colors[name][theme]) for name in (text, ground))
                assert (bright + 0.05) / (dark + 0.05) >= 4.5, (text, ground, theme)
