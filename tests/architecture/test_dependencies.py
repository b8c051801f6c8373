"""What is depended on: bounds that are tested, licences that are listed."""

from __future__ import annotations

import re

from packaging.requirements import Requirement

import mlomae
from tests.architecture.licences import families_in, families_of, needed_by
from tests.architecture.source_tree import ROOT, requirement_lines

PAGE = ROOT / "docs" / "releases.md"
# Weak copyleft of files that are used as they are; and what comes with CUDA builds of torch.
_LISTED = {"MPL", "NVIDIA"}
_ROW = re.compile(r"^\| `([\w-]+)` \| (\S*) \| ([^|]+) \|", re.MULTILINE)


def _requirements() -> dict[str, Requirement]:
    found = map(Requirement, requirement_lines())
    return {requirement.name.lower(): requirement for requirement in found}


def _rows() -> dict[str, tuple[str, str]]:
    """Oldest version and licence, by the name of the dependency."""
    return {name: (oldest, licence) for name, oldest, licence in _ROW.findall(PAGE.read_text())}


def test_every_dependency_has_a_lower_bound() -> None:
    """What `.ci/nightly oldest` installs."""
    for requirement in _requirements().values():
        assert [entry.operator for entry in requirement.specifier] == [">="], requirement


def test_the_page_lists_the_dependencies_with_their_bounds() -> None:
    bounds = {
        name: str(requirement.specifier).removeprefix(">=") for name, requirement in _requirements().items()
    }
    assert {name: oldest for name, (oldest, _) in _rows().items()} == bounds


def test_the_page_names_the_licence_of_each_dependency() -> None:
    for name, (_, licence) in _rows().items():
        found = families_of(name)
        # Between its oldest and its newest version a package may name more of what it contains.
        assert found and found <= families_in(licence) | {"other free"}, (name, found)


def test_everything_that_is_needed_has_a_permissive_licence_or_is_listed() -> None:
    page = PAGE.read_text()
    needed = needed_by("mlomae")
    assert {"torch", "numpy", "sympy"} <= needed  # also what dependencies need
    for name in needed:
        families = families_of(name)
        # A name for NVIDIA's packages without files.
        assert families or name == "cuda-toolkit", f"{name} names no licence that is known here"
        assert "GPL" not in families, name
        if families & _LISTED:
            assert f"`{name}`" in page or name.startswith("nvidia-"), f"{name}: {families}"


def test_the_changelog_begins_with_this_version() -> None:
    """A release has its section, with the day of its release instead of "unreleased"."""
    first = re.search(
        r"^## \[([^]]+)\] - (unreleased|\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert first is not None
    assert first[1] == mlomae.__version__
