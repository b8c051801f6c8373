"""Documented commands that start several processes, each of which imports torch."""

from __future__ import annotations

import pytest

from tests.docs.commands import Command
from tests.docs.execution import Execution
from tests.docs.test_commands import DIFFERENT, is_slow

pytestmark = [pytest.mark.slow, pytest.mark.dist]


@pytest.mark.parametrize(
    "command",
    [command for command in DIFFERENT if is_slow(command)],
    ids=lambda command: command.place,
)
def test_documented_commands_work(command: Command, execute: Execution) -> None:
    execute(command)
