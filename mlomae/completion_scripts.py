"""Completion scripts of the shells, from a list of what may follow which words."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

FILE, FOLDER, RECIPE = "@file", "@folder", "@recipe"
"""In place of words: names that the shell looks for."""


@dataclass(frozen=True)
class Option:
    """A flag.

    Attributes:
        values: words, or one of FILE, FOLDER and RECIPE; empty for any value, None where it takes none.
    """

    flag: str
    help: str
    values: tuple[str, ...] | None


@dataclass(frozen=True)
class Context:
    """What may follow some words of a command line.

    Attributes:
        words: those behind ``mlomae``, such as "shards create"; none for the first word itself.
        operands: words with their meaning, or one of FILE, FOLDER and RECIPE.
    """

    words: str
    operands: dict[str, str]
    options: tuple[Option, ...]


def bash(contexts: Sequence[Context], recipes: Iterable[str]) -> str:
    return _BASH.format(
        choose=_CHOOSE,
        tables=_tables(contexts),
        nested=_pattern(_nested(contexts)),
        recipes=" ".join(recipes),
    )


def zsh(contexts: Sequence[Context], recipes: Iterable[str]) -> str:
    return _ZSH.format(
        choose=_CHOOSE,
        tables=_tables(contexts),
        nested=_pattern(_nested(contexts)),
        recipes=" ".join(recipes),
    )


def fish(contexts: Sequence[Context], recipes: Iterable[str]) -> str:
    names = _quoted(" ".join(recipes))
    lines = [_FISH.format(nested=" ".join(map(_quoted, _nested(contexts))))]
    places = {
        FILE: ("-F", "-r -F"),
        FOLDER: ('-a "(__fish_complete_directories)"', '-x -a "(__fish_complete_directories)"'),
        RECIPE: (f"-F -a {names}", f"-r -F -a {names}"),
    }

    def add(where: Iterable[str], *parts: str) -> None:
        lines.append(f'complete -c mlomae -n "__mlomae_at {" ".join(map(_quoted, where))}" {" ".join(parts)}')

    for context in contexts:
        for word, meaning in context.operands.items():
            form = places[word][0] if word in places else f"-a {_quoted(word)} -d {_quoted(meaning)}"
            add([context.words], form)
    for option, where in _by_option(contexts).items():
        if option.values is None:
            form = ""
        elif option.values and option.values[0] in places:
            form = places[option.values[0]][1]
        else:
            form = f"-x -a {_quoted(' '.join(option.values))}"
        add(where, f"-l {option.flag.removeprefix('--')}", form, f"-d {_quoted(option.help)}")
    return "\n".join(lines) + "\n"


WRITERS: dict[str, Callable[[Sequence[Context], Iterable[str]], str]] = {
    "bash": bash,
    "zsh": zsh,
    "fish": fish,
}


def _nested(contexts: Sequence[Context]) -> list[str]:
    return [context.words for context in contexts if " " in context.words]


def _by_option(contexts: Sequence[Context]) -> dict[Option, list[str]]:
    found: dict[Option, list[str]] = {}
    for context in contexts:
        for option in context.options:
            found.setdefault(option, []).append(context.words)
    return found


def _tables(contexts: Sequence[Context]) -> str:
    """Two ``case`` commands, which bash and zsh read alike: by context, and by flag."""
    lines = ["case $context in"]
    for context in contexts:
        switches = [option.flag for option in context.options if option.values is None]
        sets = {
            "operands": " ".join(context.operands),
            "flags": " ".join(option.flag for option in context.options),
            "switches": " ".join(switches),
        }
        lines.append(f"{shlex.quote(context.words)})")
        lines += [f"    {name}={shlex.quote(value)}" for name, value in sets.items()]
        lines.append("    ;;")
    lines += ["esac", 'case "$context $before" in']
    by_values: dict[tuple[str, ...], list[str]] = {}
    for option, where in _by_option(contexts).items():
        if option.values:
            by_values.setdefault(option.values, []).extend(f"{words} {option.flag}" for words in where)
    for values, places in by_values.items():
        lines.append(f"{_pattern(places)}) values={shlex.quote(' '.join(values))} ;;")
    return "\n".join(f"    {line}" for line in [*lines, "esac"])


def _pattern(alternatives: Iterable[str]) -> str:
    return " | ".join(map(shlex.quote, alternatives))


def _quoted(text: str) -> str:
    """A word for fish, which knows two escapes within single quotes."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


# What bash and zsh complete at the cursor, in the words that both have.
_CHOOSE = """\
    if [[ $before == --* && " $switches " != *" $before "* ]]; then
        candidates=$values
    elif [[ $word == -* || -z $operands ]]; then
        candidates=$flags
    else
        candidates=$operands
    fi
"""

_BASH = """\
# Completion of mlomae for bash, printed by `mlomae completion bash`.

_mlomae() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}} context=${{COMP_WORDS[1]}}
    local operands= flags= switches= values= candidates= recipes='{recipes}'
    # --flag=value comes as three words.
    if [[ $word == "=" ]]; then
        word=
    elif [[ $before == "=" ]]; then
        before=${{COMP_WORDS[COMP_CWORD - 2]}}
    fi
    if ((COMP_CWORD == 1)); then
        context=
    elif ((COMP_CWORD > 2)); then
        case "$context ${{COMP_WORDS[2]}}" in
        {nested}) context+=" ${{COMP_WORDS[2]}}" ;;
        esac
    fi
{tables}
{choose}\
    case $candidates in
    @*) compopt -o filenames 2>/dev/null ;;
    esac
    case $candidates in
    @file) mapfile -t COMPREPLY < <(compgen -f -- "$word") ;;
    @folder) mapfile -t COMPREPLY < <(compgen -d -- "$word") ;;
    @recipe)
        mapfile -t COMPREPLY < <(
            compgen -W "$recipes" -- "$word"
            compgen -d -- "$word"
            compgen -f -X '!*.yaml' -- "$word"
        )
        ;;
    *) mapfile -t COMPREPLY < <(compgen -W "$candidates" -- "$word") ;;
    esac
}}
complete -F _mlomae mlomae
"""

_ZSH = """\
#compdef mlomae
# Completion of mlomae for zsh, printed by `mlomae completion zsh`.

_mlomae() {{
    local word=${{words[CURRENT]}} before=${{words[CURRENT - 1]}} context=${{words[2]}}
    local operands= flags= switches= values= candidates= recipes='{recipes}'
    if [[ $word == --*=* ]]; then
        before=${{word%%=*}} word=${{word#*=}}
        compset -P '*='
    fi
    if ((CURRENT == 2)); then
        context=
    elif ((CURRENT > 3)); then
        case "$context ${{words[3]}}" in
        {nested}) context+=" ${{words[3]}}" ;;
        esac
    fi
{tables}
{choose}\
    case $candidates in
    @file) _files ;;
    @folder) _files -/ ;;
    @recipe)
        compadd -- ${{=recipes}}
        _files -g '*.yaml'
        ;;
    *) compadd -- ${{=candidates}} ;;
    esac
}}
if [[ ${{funcstack[1]}} == _mlomae ]]; then
    _mlomae "$@"
else
    compdef _mlomae mlomae
fi
"""

_FISH = """\
# Completion of mlomae for fish, printed by `mlomae completion fish`.

function __mlomae_at
    set -l words (commandline -opc)
    set -l context "$words[2]"
    if contains -- "$words[2..3]" {nested}
        set context "$words[2..3]"
    end
    contains -- "$context" $argv
end

complete -c mlomae -f\
"""
