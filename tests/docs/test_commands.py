"""Every command in the documents is executed: see ``tests/docs/rules.py`` for how.

The tutorial's run as they stand (``test_tutorial.py``); those that start several processes have a file of
their own, ``test_slow_commands.py``.
"""

from __future__ import annotations

import pytest

from tests.docs.commands import Command, commands, different, pages, shown_elsewhere
from tests.docs.execution import Execution
from tests.docs.rules import RULES, Rule, find_rule, rule_of

TUTORIAL = "docs/tutorial.md"
COMMANDS = [command for page in pages() if page != TUTORIAL for command in commands(page)]
DIFFERENT = different(COMMANDS)
PROGRAMS = ("mlomae", "python", "python3", "pip", "pytest", "torchrun", "deepspeed", "sbatch", "mkdocs")


def is_slow(command: Command) -> bool:
    rule = find_rule(command)
    return rule is not None and rule.slow


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [command for command in DIFFERENT if not is_slow(command)],
    ids=lambda command: command.place,
)
def test_documented_commands_work(command: Command, execute: Execution) -> None:
    execute(command)


def test_every_command_has_a_rule() -> None:
    for command in COMMANDS:
        rule_of(command)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.pattern)
def test_every_rule_has_a_command(rule: Rule) -> None:
    assert any(find_rule(command) is rule for command in COMMANDS), (
        "no documented command comes to this rule: remove it from tests/docs/rules.py"
    )


def test_commands_stand_in_shell_blocks() -> None:
    """Elsewhere nobody would execute them."""
    assert shown_elsewhere(PROGRAMS) == []
