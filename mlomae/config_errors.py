"""Validation errors of the configuration in words for users."""

from __future__ import annotations

from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from mlomae.arguments import did_you_mean

# Problems that pydantic words for programmers.
PLAIN = {
    "model_type": "expected a mapping of fields",
    "tuple_type": "expected a list",
    "path_type": "expected a path (./1 for a folder called 1)",
}


def describe(error: ValidationError, root: type[BaseModel]) -> str:
    """The first problem of a validation error as ``field: what was found, what would be right``.

    Args:
        root: the tree that was validated.
    """
    errors = error.errors()
    first = errors[0]
    if isinstance(first["input"], list):
        # Of a number or a list, the list is what was meant.
        first = next((e for e in errors if any("[" in str(part) for part in e["loc"])), first)
    *parents, last = first["loc"] or ("config",)
    names = [str(part) for part in parents if not _is_union_tag(part)]
    if first["type"] == "extra_forbidden":
        # A key, whatever it looks like.
        known = _fields_of_section(root, names)
        return f"{'.'.join([*names, str(last)])}: unknown key; {did_you_mean(str(last), known)}"
    field = ".".join(names if _is_union_tag(last) else [*names, str(last)])
    if first["type"] == "value_error":
        return f"{field}: {first['ctx']['error']}"
    message = PLAIN.get(first["type"], first["msg"][0].lower() + first["msg"][1:])
    return f"{field}: {message}, found {first['input']!r}"


def _is_union_tag(part: int | str) -> bool:
    return isinstance(part, str) and ("[" in part or part in ("int", "constrained-int"))


def _fields_of_section(root: type[BaseModel], names: list[str]) -> list[str]:
    section: Any = root
    for name in names:
        if get_origin(section) is dict:  # of sections by name
            section = get_args(section)[1]
            continue
        if name not in section.model_fields:
            return []
        annotation = section.model_fields[name].annotation
        if get_origin(annotation) in (Union, UnionType):
            annotation = get_args(annotation)[0]
        section = annotation
    return list(section.model_fields)
