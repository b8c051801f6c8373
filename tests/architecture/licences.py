"""Licences of installed distributions, by family, and the distributions that another one needs."""

from __future__ import annotations

import re
from importlib import metadata

from packaging.requirements import Requirement

# In the words of their metadata, which are many.
_FAMILIES = {
    "MIT": r"\bMIT\b",
    "BSD": r"BSD",
    "Apache": r"Apache",
    "PSF": r"\bPSF\b|Python Software Foundation",
    "MPL": r"\bMPL\b|Mozilla",
    "GPL": r"GPL",
    "NVIDIA": r"NVIDIA|Proprietary",
    "other free": r"Zlib|CC0|HPND|\bBSL-1\.0\b|\bISC\b",
}


def families_of(name: str) -> set[str]:
    """Families of the licences that an installed distribution names; empty where it names none."""
    about = metadata.metadata(name)
    classifiers = [text for text in about.get_all("Classifier") or () if text.startswith("License ::")]
    # Some have the whole text in the field for its name.
    texts = [about.get("License-Expression") or "", (about.get("License") or "")[:80], *classifiers]
    return families_in(" ".join(texts))


def families_in(text: str) -> set[str]:
    """Families of the licences that a text names."""
    return {family for family, words in _FAMILIES.items() if re.search(words, text)}


def needed_by(name: str) -> set[str]:
    """Names, in lower case, of the installed distributions that one needs, without its extras."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        current = waiting.pop()
        for line in metadata.requires(current) or ():
            requirement = Requirement(line)
            key = requirement.name.lower().replace("_", "-")
            wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if wanted and key not in found and _installed(key):
                found.add(key)
                waiting.append(key)
    return found


def _installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True
